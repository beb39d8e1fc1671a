"""A Docker engine of our own, with base images made from Debian's packages: nothing is pulled."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sepdeploy.bench.arm_root import arm64_files, find_root
from sepdeploy.bench.docker_engine import DEFAULT_IMAGE, docker
from sepdeploy.core.progress import Silent

LIMIT_SECONDS = 60.0
NATIVE_PACKAGES = ("qemu-user", "gcc", "libc6-dev", "dash", "coreutils", "sed")
LEFT_OUT = re.compile(r"^/usr/share/|^/usr/bin/qemu-(?!aarch64$)|lto1$|lto-dump|[a-z]san\.")
DOCKERD = (
    "--iptables=false",
    "--bridge=none",
    "--ip-forward=false",
    "--ip-masq=false",
    "--storage-driver=overlay2",
)


@dataclass(frozen=True)
class Engine:
    """A running engine, which DOCKER_HOST names while the tests of this folder run.

    Attributes:
        host: Its socket as a URL.
        socket: The socket.
    """

    host: str
    socket: Path

    def containers(self) -> list[str]:
        """Names of all containers, running or not."""
        return docker(["ps", "--all", "--format", "{{.Names}}"], purpose="test").output.split()


@pytest.fixture(scope="session")
def engine(program: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine that ends with the tests, with everything that it made."""
    dockerd = program("dockerd")
    if os.geteuid() != 0:
        pytest.skip("only root can start a Docker engine")
    folder = tmp_path_factory.mktemp("docker")
    # In memory: a gigabyte that is written once and removed soon would keep the disk busy for half a minute.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6g,mode=711", "sepdeploy-test", str(folder)], check=True)
    try:
        yield from _running(dockerd, folder)
    finally:
        subprocess.run(["umount", "--recursive", str(folder)], check=True)


def _running(dockerd: str, folder: Path) -> Iterator[Engine]:
    socket = folder / "s"
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [dockerd, *DOCKERD, f"--host=unix://{socket}", f"--data-root={folder}/data", f"--exec-root={folder}/exec",
             f"--pidfile={folder}/pid"],
            stdout=log, stderr=log,
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DOCKER_HOST", f"unix://{socket}")
            patch.delenv("DOCKER_CONTEXT", raising=False)
            patch.setenv("PATH", f"/usr/bin:{os.environ['PATH']}")  # the client that comes with the engine
            patch.setenv("DOCKER_BUILDKIT", "1")
            try:
                end = time.monotonic() + LIMIT_SECONDS
                while docker(["version"], purpose="test").code:
                    assert server.poll() is None, (folder / "log").read_text()
                    assert time.monotonic() < end, (folder / "log").read_text()
                    time.sleep(0.1)
                yield Engine(f"unix://{socket}", socket)
            finally:
                server.terminate()
                server.wait(LIMIT_SECONDS)


@pytest.fixture(scope="session")
def image(engine: Engine, program: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image, built by its Dockerfile without a network."""
    for name in ("qemu-aarch64", "mmdebstrap", "llvm-mca-19"):
        program(name)
    folder = tmp_path_factory.mktemp("bases")
    native, arm64 = folder / "native.tar", folder / "arm64.tar"
    _write_native_root(native)
    _load(native, "sepdeploy-test-native:1", _architecture())
    with tarfile.open(arm64, "w") as archive:
        archive.add(find_root(Silent()) / "root", arcname=".")
    _load(arm64, "sepdeploy-test-arm64:1", "arm64")
    bases = ["NATIVE_BASE=sepdeploy-test-native:1", "ARM64_BASE=sepdeploy-test-arm64:1"]
    built = docker(
        ["build", "--network=none", "--tag", DEFAULT_IMAGE, *(w for base in bases for w in ("--build-arg", base)),
         str(arm64_files())],
        purpose="building the image", limit_seconds=600,
    )  # fmt: skip
    assert built.code == 0, built.output + built.errors
    for path in (native, arm64):
        path.unlink()
    return DEFAULT_IMAGE


def _write_native_root(path: Path) -> None:
    """A tar file of the installed files of some packages and of all that they depend on: quicker than downloads."""
    if shutil.which("dpkg") is None:
        pytest.skip("the native base is made of installed Debian packages")
    kinds = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    options = ["--recurse", "--installed", *(f"--no-{kind}" for kind in kinds)]
    found = _output("apt-cache", "depends", *options, *NATIVE_PACKAGES)
    packages = sorted({line for line in found.splitlines() if line and line[0].isalnum()})
    files = {Path(line) for line in _output("dpkg", "-L", *packages).splitlines() if line.startswith("/")}
    merged = ("bin", "sbin", "lib", "lib64")
    places = {Path("usr", *file.parts[1:]) if file.parts[1:2] and file.parts[1] in merged else Path(*file.parts[1:])
              for file in files if not LEFT_OUT.search(str(file))}  # fmt: skip
    with tarfile.open(path, "w") as archive:
        for name in merged:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
            archive.addfile(link)
        for place in sorted(places):
            file = Path("/", place)
            if file.is_symlink() or file.is_file():
                archive.add(file, place, recursive=False)
        for name in ("tmp", "proc", "sys", "dev", "root"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            archive.addfile(folder)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _architecture() -> str:
    return docker(["version", "--format", "{{.Server.Arch}}"], purpose="test").output.strip()


def _load(root: Path, tag: str, architecture: str) -> None:
    """Load a root, as a tar file, as an image: what `docker save` writes for one of a single layer."""
    with root.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    config = {
        "architecture": architecture,
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": {"Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [tag], "Layers": ["layer.tar"]}]
    path = root.with_suffix(".image")
    with tarfile.open(path, "w") as archive:
        for name, data in (("config.json", config), ("manifest.json", manifest)):
            text = json.dumps(data).encode()
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
        archive.add(root, "layer.tar")
    loaded = docker(["load", "--input", str(path)], purpose="loading a base", limit_seconds=300)
    path.unlink()
    assert loaded.code == 0, loaded.errors
