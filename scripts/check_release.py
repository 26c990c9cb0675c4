"""What must be true of a release before anyone can install it: versions agree, the changelog has it, wheels are small.

Usage: python scripts/check_release.py FOLDER [--tag v1.2.3]; the folder holds the sdist and the wheels. Without a tag
the changelog may still call the version unreleased. Prints each fault and exits with 1 if there is any.
"""

import argparse
import re
import sys
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
WHEEL_BYTES = 1_500_000
EXTENSION = re.compile(r"qkv_fast/_core\.[^/]+\.(so|pyd)")


def version(checkout):
    """The one place that has it, as text: nothing needs to be built to know it."""
    text = (checkout / "qkv_fast" / "_version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def changelog_faults(text, version, tagged):
    """The newest section is this version's, has entries, and, once tagged, a date."""
    title, _, body = text.partition("\n## ")[2].partition("\n")
    found = re.fullmatch(r"(\S+) \((unreleased|\d{4}-\d\d-\d\d)\)", title)
    if not found or found[1] != version:
        return [f"CHANGELOG.md: the first section is {title!r}, not {version}'s"]
    faults = []
    if "\n- " not in body.partition("\n## ")[0]:
        faults.append(f"CHANGELOG.md: {version} has no entry")
    if tagged and found[2] == "unreleased":
        faults.append(f"CHANGELOG.md: {version} has no date")
    return faults


def archive_faults(files, version):
    """One sdist, and wheels of this version that are small and hold one library, ours."""
    faults = []
    wheels = [file for file in files if file.suffix == ".whl"]
    sdists = [file.name for file in files if file.name.endswith(".tar.gz")]
    if sdists != [f"qkv_fast-{version}.tar.gz"]:
        faults.append(f"the sdist of {version} is missing, or not alone: {', '.join(sdists) or 'none'}")
    if not wheels:
        faults.append("no wheel")
    for wheel in wheels:
        if not wheel.name.startswith(f"qkv_fast-{version}-"):
            faults.append(f"{wheel.name}: not of version {version}")
        if wheel.stat().st_size > WHEEL_BYTES:
            faults.append(f"{wheel.name}: {wheel.stat().st_size} bytes, more than {WHEEL_BYTES}")
        with zipfile.ZipFile(wheel) as archive:
            libraries = [name for name in archive.namelist() if re.search(r"\.(so|pyd|dll|dylib)(\.|$)", name)]
        if len(libraries) != 1 or not EXTENSION.fullmatch(libraries[0]):
            faults.append(f"{wheel.name}: its libraries are {', '.join(libraries) or 'none'}, not the extension alone")
    return faults


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with the sdist and the wheels")
    parser.add_argument("--tag", help="the tag that is released")
    args = parser.parse_args(argv)
    ours = version(CHECKOUT)
    faults = [f"the tag is {args.tag}, the version {ours}"] if args.tag and args.tag != f"v{ours}" else []
    faults += changelog_faults((CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8"), ours, bool(args.tag))
    faults += archive_faults(sorted(args.folder.iterdir()), ours)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
