# SPDX-License-Identifier: Apache-2.0

"""``python -m tests.dependencies``: licences and known advisories of the packages that are installed.

Exit status 1 if a licence is neither permissive nor in `LICENCES`, or an advisory is not in `ADVISORIES`.
Advisories come from osv.dev in one request; without a network the command says that they were not looked up.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import urllib.request
from fnmatch import fnmatch
from importlib import metadata

SERVICE = "https://api.osv.dev/v1/querybatch"
SECONDS = 20
PERMISSIVE = re.compile(
    r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|Unlicense|HPND|Zlib|MPL|Mozilla|CC0|0BSD|MIT-CMU"
    r"|Historical Permission|Public Domain|Boost|BSL-1\.0)\b",
    re.IGNORECASE,
)
STRONG = re.compile(
    r"(?<!L)\bA?GPL|(?<!Lesser )General Public License|NVIDIA|Proprietary", re.IGNORECASE
)
_CUDA = "required by PyTorch on a GPU: free to use, and none of it is passed on"
LICENCES: dict[str, str] = {
    "connected-components-3d": "LGPL: called as a library, not changed, not passed on",
    "openslide-bin": "LGPL: OpenSlide itself, called as a library, not changed, not passed on",
    "mlcroissant": "Apache-2.0 by LICENSE.md of its repository, mlcommons/croissant; for tests alone",
    "pycocotools": "its FreeBSD licence is the BSD licence of two clauses",
    "cuda-*": _CUDA,
    "nvidia-*": _CUDA,
}
"""Package, or pattern of names -> why its licence, or the lack of one, is no hindrance."""
ADVISORIES: dict[str, str] = {}
"""Id of an advisory -> why it does not concern this project."""


def licence_of(package: metadata.Distribution) -> str:
    """Return the licence as the package states it, or ""."""
    about = package.metadata
    stated = [about.get("License-Expression") or ""]
    stated += [
        line.rpartition("::")[2].strip()
        for line in about.get_all("Classifier") or ()
        if "License ::" in line
    ]
    stated += [(about.get("License") or "").strip().split("\n")[0][:80]]
    return next((text for text in stated if text and text not in ("OSI Approved", "UNKNOWN")), "")


def unlisted_licences(packages: list[metadata.Distribution]) -> list[str]:
    """Return a line for each package whose licence nobody has looked at."""
    found = []
    for package in packages:
        name, licence = package.metadata["Name"], licence_of(package)
        is_free = PERMISSIVE.search(licence) and not STRONG.search(licence)
        if not is_free and not any(fnmatch(name.lower(), known) for known in LICENCES):
            found.append(f"{name} {package.version}: {licence or 'no licence is stated'}")
    return found


def advisories(packages: list[metadata.Distribution], service: str = SERVICE) -> list[str]:
    """Return a line for each known advisory of an installed version.

    Raises:
        OSError: the service can't be reached, or answers no list.
    """
    asked = [
        {
            "package": {"ecosystem": "PyPI", "name": package.metadata["Name"]},
            "version": package.version.split("+")[0],
        }
        for package in packages
    ]
    request = urllib.request.Request(
        service, json.dumps({"queries": asked}).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            results = json.load(answer)["results"]
        pairs = list(zip(asked, results, strict=True))
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"an answer that can't be read: {error}") from error
    return [
        f"{query['package']['name']} {query['version']}: {found['id']}"
        for query, result in pairs
        for found in (result or {}).get("vulns", ())
        if found["id"] not in ADVISORIES
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.dependencies", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print each package with its licence")
    parser.add_argument("--service", default=SERVICE)
    options = parser.parse_args(arguments)
    packages = sorted(metadata.distributions(), key=lambda one: str(one.metadata["Name"]).lower())
    packages = [one for one in packages if one.metadata["Name"]]
    if options.list:
        for package in packages:
            print(f"{package.metadata['Name']} {package.version}\t{licence_of(package)}")
    wrong = [f"licence to be looked at: {line}" for line in unlisted_licences(packages)]
    try:
        wrong += [f"advisory: {line}" for line in advisories(packages, options.service)]
        told = "their advisories were looked up"
    except OSError as error:
        told = f"their advisories were NOT looked up: no answer from {options.service} ({error})"
    print("\n".join([*wrong, f"{len(packages)} packages, {len(wrong)} to be looked at; {told}"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
