"""BIDS datasets: the anatomical images of their subjects.

After the Brain Imaging Data Structure 1.10: `sub-*/[ses-*/]anat/*_SUFFIX.nii[.gz]`; a dataset of derivatives is laid
out alike. What derivatives, sourcedata and code beside the subjects hold is not looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from segcore.errors import SceneError

#: The file that makes a folder a dataset.
DESCRIPTION = "dataset_description.json"
_SUFFIXES = ("T1w", "T2w", "PDw", "T2starw", "FLAIR", "inplaneT1", "inplaneT2", "PDT2", "UNIT1", "angio")
_VOLUMES = (".nii", ".nii.gz")


def bids_suffix(channel: str) -> str:
    """The suffix of images for a model with this first channel: T1w for `T1w`, `t1` and all that is no suffix."""
    named = {suffix.lower(): suffix for suffix in _SUFFIXES}
    return named.get(channel.lower()) or named.get(f"{channel.lower()}w") or "T1w"


def bids_scenes(root: Path, suffix: str) -> list[str]:
    """The images of a dataset with a suffix, by subject and session. Raises SceneError where there is none.

    Names of files in a dataset hold its entities, so no two have the same (`sub-01_ses-1_T1w`).
    """
    wanted = tuple(f"_{suffix}{volume}" for volume in _VOLUMES)
    found, others = [], set()
    for folder in _anatomies(root):
        for name in _names(folder):
            if name.endswith(wanted):
                found.append(str(folder / name))
            elif name.endswith(_VOLUMES):
                others.add(name.partition(".")[0].rpartition("_")[2])
    if not found:
        has = f"it has {', '.join(sorted(others))}" if others else "it has no anatomical images; are they fetched?"
        raise SceneError(f"{root} is a BIDS dataset without an image {wanted[0]}[.gz]: {has}")
    return found


def _anatomies(root: Path) -> Iterator[Path]:
    for subject in _names(root, "sub-"):
        here = _names(root / subject)
        if "anat" in here:
            yield root / subject / "anat"
        for session in here:
            if session.startswith("ses-") and "anat" in _names(root / subject / session):
                yield root / subject / session / "anat"


def _names(folder: Path, prefix: str = "") -> list[str]:
    """The names in a folder, in order; hidden ones are left out."""
    if not folder.is_dir():
        return []
    return sorted(name for name in os.listdir(folder) if name.startswith(prefix) and not name.startswith("."))
