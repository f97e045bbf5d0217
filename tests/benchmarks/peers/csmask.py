"""ukis-csmask's own program on the array that segflow reads: SCENE OUT."""

from __future__ import annotations

import sys

import numpy as np
from ukis_csmask.mask import CSmask

from segcore import demo
from segcore.io import open_scene
from segcore.model.card import load_card
from segcore.spec import Settings
from segcore.survey import wanted_by


def main() -> None:
    scene, out = sys.argv[1:]
    source = open_scene(scene, wanted_by(load_card(demo.CLOUD_MODEL).card), Settings())
    image = np.ascontiguousarray(np.nan_to_num(source.read(source.grid.box)).transpose(1, 2, 0))
    np.save(out, CSmask(image, list(source.channels)).csm)


if __name__ == "__main__":
    main()
