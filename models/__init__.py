"""Reference networks: plain PyTorch, one family per file, usable without the rest of sepdeploy."""
