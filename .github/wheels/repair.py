"""Makes of a wheel that was just built the one that is published: repair.py WHEEL FOLDER [FOLDER-FOR-SYMBOLS]

What gdb and perf want to know is moved out of the extension modules, a tenth of whose size is code. It goes to an
archive of its own, since who needs it has a crash or a profile of just these modules, which a build with other flags
would not explain: `tar -C SITE-PACKAGES -xf NAME.debug.tar.xz`, and gdb finds it by itself.

The wheel says what is inside it that is not of this package: liburing's licence, and a bill of materials (PEP 770).
auditwheel then gives it the oldest tag that its symbols allow, and refuses it if it needs a library of the system.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path


def fail(reason):
    sys.exit(f"repair.py: {reason}")


def split_symbols(module):
    """Moves a module's debug information and local symbols to .debug/, where debuggers look."""
    symbols = module.parent / ".debug" / f"{module.name}.debug"
    symbols.parent.mkdir(exist_ok=True)
    subprocess.run(["objcopy", "--only-keep-debug", "--compress-debug-sections", module, symbols], check=True)
    subprocess.run(["objcopy", "--strip-unneeded", f"--add-gnu-debuglink={symbols}", module], check=True)
    return symbols


def liburing():
    """Where liburing.sh put what it knows of liburing."""
    done = subprocess.run(["pkg-config", "--variable=prefix", "liburing"], capture_output=True, text=True)
    folder = Path(done.stdout.strip(), "share", "licenses", "liburing")
    if done.returncode != 0 or not (folder / "origin").exists():
        fail("the liburing that pkg-config finds is not from liburing.sh (PKG_CONFIG_PATH)")
    return folder


def bill_of_materials(origin):
    """CycloneDX."""
    version, sha256, url = origin.split()
    component = {
        "type": "library",
        "name": "liburing",
        "version": version,
        "licenses": [{"license": {"id": "MIT"}}],
        "purl": f"pkg:generic/liburing@{version}?download_url={url}&checksum=sha256:{sha256}",
    }
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": [component]}


def say_what_is_inside(dist_info):
    folder = liburing()
    licence = dist_info / "licenses" / "liburing" / "LICENSE"
    licence.parent.mkdir(parents=True)
    licence.write_bytes((folder / "LICENSE").read_bytes())
    bill = dist_info / "sboms" / "liburing.cdx.json"
    bill.parent.mkdir()
    bill.write_text(json.dumps(bill_of_materials((folder / "origin").read_text()), indent=2) + "\n")


def write_wheel(folder, path, dates):
    """Packs a folder, its RECORD last, as wheels have it."""
    [record] = folder.glob("*.dist-info/RECORD")
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != record)
    lines = []
    for file in files:
        digest = base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest()).rstrip(b"=").decode()
        lines.append(f"{file.relative_to(folder)},sha256={digest},{file.stat().st_size}\n")
    record.write_text("".join(lines) + f"{record.relative_to(folder)},,\n")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for file in [*files, record]:
            name = str(file.relative_to(folder))
            info = zipfile.ZipInfo(name, dates.get(name, max(dates.values())))
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (0o100755 if file.suffix == ".so" else 0o100644) << 16
            archive.writestr(info, file.read_bytes())


def repair(wheel, out, symbols_out):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "wheel")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
            dates = {info.filename: info.date_time for info in archive.infolist()}
        [dist_info] = folder.glob("*.dist-info")
        modules = sorted(folder.rglob("*.so"))
        if not modules:
            fail(f"{wheel.name} has no extension modules")
        if any(b"liburing.so" in module.read_bytes() for module in modules):
            fail(f"{wheel.name} wants the system's liburing: build it with liburing.sh's (PKG_CONFIG_PATH)")
        if symbols_out is not None:
            symbols_out.mkdir(parents=True, exist_ok=True)
            with tarfile.open(symbols_out / f"{wheel.stem}.debug.tar.xz", "w:xz") as archive:
                for module in modules:
                    symbols = split_symbols(module)
                    archive.add(symbols, symbols.relative_to(folder))
                    symbols.unlink()
                    if not os.listdir(symbols.parent):
                        symbols.parent.rmdir()
        else:
            for module in modules:
                subprocess.run(["objcopy", "--strip-unneeded", module], check=True)
        say_what_is_inside(dist_info)
        whole = Path(scratch, wheel.name)
        write_wheel(folder, whole, dates)
        subprocess.run(["auditwheel", "repair", "--wheel-dir", out, whole], check=True)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        fail("usage: repair.py WHEEL FOLDER [FOLDER-FOR-SYMBOLS]")
    repair(*map(Path, sys.argv[1:3]), Path(sys.argv[3]) if sys.argv[3:] else None)
