"""Images from folders, npz files and manifests, as batches of numpy arrays; nothing here imports torch."""
