"""segcore: labels images of any size with a network that sees only a part of them. See DESIGN.md beside this file."""

import os
import sys

# Nobody is told what is done with it. ONNX Runtime reads these when it is first imported (the second in some versions),
# and would report every model that is loaded to Microsoft, by name and hash; OpenVINO reports each import to Google by
# this package, and does without where it is not to be had. Whoever has set them otherwise, or imported it before, is
# obeyed.
for _name in ("ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED"):
    os.environ.setdefault(_name, "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
