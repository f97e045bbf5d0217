"""Packing: every way in, what comes out runs and says the same, and what must not be loaded is not."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_if_trained, draft
from onnx import TensorProto, helper, save
from safetensors.torch import save_file
from torch import nn

from segcore.errors import CardError, ModelError, SegcoreError
from segcore.files import sha256_of
from segcore.model import load_segmenter
from segcore.model.archive import kind_of, open_export
from segcore.model.card import Model, NetworkClass, check_network, load_card
from segcore.model.pack import pack
from segcore.model.unet import UNet

OURS = NetworkClass(
    name="segcore.model.unet.UNet",
    arguments={"dims": 2, "in_channels": 2, "classes": 3, "widths": [4, 6, 8]},
)


def unet() -> nn.Module:
    return as_if_trained(UNet(**OURS.arguments))


def agrees(model: Model, module: nn.Module, ndim: int = 2, channels: int = 2) -> None:
    """Every artifact gives the module's scores, on a size that it was not exported at."""
    image = np.random.default_rng(1).standard_normal((2, channels, *(80, 48, 32)[:ndim])).astype(np.float32)
    with torch.inference_mode():
        expected = module(torch.from_numpy(image)).numpy()
    for artifact in model.card.artifacts:
        one = Model(model.card.model_copy(update={"artifacts": (artifact,)}), model.folder)
        got = load_segmenter(one, 2)(image)
        assert np.allclose(got, expected, atol=1e-4 * max(1, np.abs(expected).max())), artifact.format


def test_a_module_becomes_onnx_and_torch_export(tmp_path: Path) -> None:
    module = unet()
    packed = pack(module, draft(), tmp_path / "model")
    assert packed.notes == ()
    assert [a.format for a in packed.model.card.artifacts] == ["onnx", "torch-export"]
    card = load_card(str(tmp_path / "model")).card
    assert card == packed.model.card
    assert (card.stride, card.local, card.reach) == ((4, 4), True, (22, 22))
    assert card.probe is not None
    assert card.probe.parameters == sum(p.numel() for p in module.parameters())
    assert 20 < card.bytes_per_pixel < 2000
    agrees(packed.model, module)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_a_state_dict_and_its_class_become_safetensors_too(tmp_path: Path, suffix: str) -> None:
    module, path = unet(), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(module.state_dict(), path)
    else:
        torch.save({"state_dict": module.state_dict(), "epoch": 3} if suffix == ".ckpt" else module.state_dict(), path)
    packed = pack(path, draft(), tmp_path / "model", OURS)
    assert [a.format for a in packed.model.card.artifacts] == ["onnx", "torch-export", "safetensors"]
    agrees(load_card(str(tmp_path / "model")), module)


@pytest.mark.parametrize(("ndim", "norm"), [(2, "batch"), (3, "instance")])
def test_networks_of_monai(tmp_path: Path, ndim: int, norm: str) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    arguments = {"spatial_dims": ndim, "in_channels": 1, "out_channels": 3, "features": [4] * 6, "norm": norm}
    torch.manual_seed(0)
    module = nets.BasicUNet(**arguments).eval()
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    network = NetworkClass(name="monai.networks.nets.BasicUNet", arguments=arguments)
    packed = pack(tmp_path / "weights.safetensors", draft("zyx"[-ndim:], ("T1w",)), tmp_path / "model", network)
    card = packed.model.card
    assert len(card.artifacts) == 3
    agrees(packed.model, module, ndim, 1)
    if norm == "batch":
        assert (card.local, card.reach) == (True, (94,) * ndim)
    else:
        assert (card.local, card.reach) == (False, None)
        assert card.window == ({2: 512, 3: 128}[ndim],) * ndim
        assert "names no window" in packed.notes[0]


def test_networks_of_segmentation_models_pytorch(tmp_path: Path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", exc_type=ImportError)
    arguments = {"encoder_name": "resnet18", "in_channels": 2, "classes": 3, "decoder_channels": [16, 8, 8, 8, 8]}
    module = smp.Unet(encoder_weights=None, **arguments).eval()
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    network = NetworkClass(name="segmentation_models_pytorch.Unet", arguments=arguments)
    packed = pack(tmp_path / "weights.safetensors", draft(), tmp_path / "model", network)
    assert packed.model.card.local
    agrees(packed.model, module)


def as_onnx(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.zeros(1, 2, 64, 64),), path, dynamo=False, input_names=["x"],
                          dynamic_axes={"x": {0: "n", 2: "h", 3: "w"}})  # fmt: skip
    return path


def as_torchscript(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), path)
    return path


def as_export(module: nn.Module, path: Path) -> Path:
    free = ({0: torch.export.Dim("n"), 2: 4 * torch.export.Dim("h", min=2), 3: 4 * torch.export.Dim("w", min=2)},)
    torch.export.save(torch.export.export(module, (torch.zeros(2, 2, 64, 64),), dynamic_shapes=free), path)
    return path


class Plain(nn.Module):
    """A small U-Net that TorchScript can read."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.down, self.up, self.head = nn.MaxPool2d(4), nn.Upsample(scale_factor=4.0), nn.Conv2d(8, 3, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        fine = torch.relu(self.fine(image))
        return self.head(torch.cat([fine, self.up(torch.relu(self.coarse(self.down(fine))))], 1))


@pytest.mark.parametrize(
    ("write", "name", "kind"),
    [(as_onnx, "net.onnx", "onnx"), (as_torchscript, "net.pt", "torchscript")],
)
def test_files_that_are_networks_are_packed_as_they_are(
    tmp_path: Path, write: Callable[[nn.Module, Path], Path], name: str, kind: str
) -> None:
    torch.manual_seed(0)
    module = Plain().eval()
    path = write(module, tmp_path / name)
    assert kind_of(path) == kind
    packed = pack(path, draft(), tmp_path / "model")
    assert [a.format for a in packed.model.card.artifacts] == [kind]
    assert packed.model.card.stride == (4, 4)
    assert packed.model.card.reach == (8, 8)  # 1 pixel into the next cell, whose neighbour it reaches
    agrees(load_card(str(tmp_path / "model")), module)


def test_an_onnx_file_with_weights_beside_it_becomes_one_file(tmp_path: Path) -> None:
    import onnx

    module = Plain().eval()
    model = onnx.load(as_onnx(module, tmp_path / "net.onnx"))
    (tmp_path / "spread").mkdir()
    onnx.save(
        model, tmp_path / "spread" / "net.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    packed = pack(tmp_path / "spread" / "net.onnx", draft(), tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["card.json", "model.onnx"]
    agrees(packed.model, module)


def test_a_network_of_one_output_labels_two_classes(tmp_path: Path) -> None:
    module = nn.Conv2d(2, 1, 3, padding=1)
    packed = pack(module, draft(classes=2, activation="sigmoid"), tmp_path / "model")
    assert packed.model.card.binary
    with pytest.raises(CardError, match="1 scores for each pixel, and the draft names 2 classes"):
        pack(module, draft(classes=2), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_fixed_size_becomes_the_window(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Plain().eval(), (torch.zeros(1, 2, 64, 96),), tmp_path / "net.onnx", dynamo=False)
    card = pack(tmp_path / "net.onnx", draft(), tmp_path / "model").model.card
    assert (card.fixed_window, card.window, card.overlap) == (True, (64, 96), (32, 48))


def test_the_graph_tells_what_hides_from_nan(tmp_path: Path) -> None:
    class Gate(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            peak = image.amax(dim=(1, 2, 3), keepdim=True)
            return self.conv(torch.where(image > 0.5 * torch.nan_to_num(peak), image, 0 * image))

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3, padding=1)

    card = pack(Gate(), draft(), tmp_path / "model").model.card
    assert not card.local
    assert card.overlap == (256, 256)


def test_an_onnx_file_of_two_outputs_is_refused(tmp_path: Path) -> None:
    import onnx

    model = onnx.load(as_onnx(Plain().eval(), tmp_path / "net.onnx"))
    model.graph.output.append(onnx.helper.make_tensor_value_info(model.graph.node[0].output[0], 1, None))
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="segflow wants one, the scores"):
        pack(tmp_path / "net.onnx", draft(), tmp_path / "model")


def test_a_network_of_a_large_stride_is_packed(tmp_path: Path) -> None:
    module = nn.Sequential(nn.MaxPool2d(128), nn.Conv2d(2, 3, 1), nn.Upsample(scale_factor=128))
    card = pack(module, draft(), tmp_path / "model").model.card
    assert card.stride == (128, 128)
    assert len(card.artifacts) == 2


def test_a_module_stays_as_it_was(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)).double().train()
    card = pack(module, draft(), tmp_path / "model").model.card
    assert card.local
    assert module.training
    assert next(module.parameters()).dtype == torch.float64


def test_weights_beside_an_onnx_file_are_not_found_when_it_runs(tmp_path: Path) -> None:
    """No digest vouches for them."""
    import onnx

    folder = pack(Plain().eval(), draft(), tmp_path / "model").model.folder
    onnx.save(onnx.load(folder / "model.onnx"), folder / "model.onnx", save_as_external_data=True, location="w.bin",
              size_threshold=0)  # fmt: skip
    card = json.loads((folder / "card.json").read_text())
    card["artifacts"][0]["sha256"] = sha256_of(folder / "model.onnx")
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(ModelError, match="does not load in ONNX Runtime"):
        load_segmenter(load_card(str(folder)), 2)


#: Python's parser sees a comment here, and one that skips new lines a call.
SMUGGLED = json.dumps({"expr_str": "Max('a\\\n'#', __import__('os').system('x')\n)"}).encode()[1:-1]


def armed_export(path: Path, member: str, change: Callable[[bytes], bytes]) -> Path:
    """A torch.export archive with one member changed, or added."""
    as_export(Plain().eval(), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(members)).partition("/")[0]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, change(content) if name == f"{root}/{member}" else content)
        if f"{root}/{member}" not in members:
            archive.writestr(f"{root}/{member}", change(b""))
    return path


@pytest.mark.parametrize(
    ("member", "change", "words"),
    [
        ("data/weights/model_weights_config.json", lambda c: c.replace(b'"use_pickle": false', b'"use_pickle": true'),
         "is pickled"),
        ("data/aotinductor/model/a.so", lambda _: b"ELF", "which no network needs"),
        ("DATA/weights/model_weights_config.json", lambda _: b"{}", "two members of one name"),
        ("../other/version", lambda _: b"1", "which no network needs"),
        ("models/model.json", lambda c: c.replace(b"torch.ops.aten.relu.default", b"torch.os.system"), "not among"),
        ("models/model.json", lambda c: c.replace(b"aten.relu.default", b"aten.from_file.default"), "not among"),
        ("models/model.json", lambda c: c.replace(b"Integer(", b"__import__('os').system(", 1), "no arithmetic"),
        ("models/model.json", lambda c: re.sub(rb'"expr_str": "[^"]*"', lambda _: SMUGGLED, c), "no arithmetic"),
        ("models/model.json", lambda c: c.replace(b'builtins.tuple', b'collections.defaultdict'), "plain tuples"),
    ],
)  # fmt: skip
def test_export_archives_that_bring_code_are_not_opened(
    tmp_path: Path, member: str, change: Callable[[bytes], bytes], words: str
) -> None:
    path = armed_export(tmp_path / "net.pt2", member, change)
    with pytest.raises(ModelError, match=words):
        open_export(path)


def test_arguments_that_fetch_weights_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("monai")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    network = NetworkClass(name="monai.networks.nets.HoVerNet", arguments={"pretrained_url": "http://example.org/a"})
    with pytest.raises(CardError, match="fetches weights"):
        pack(tmp_path / "a.safetensors", draft(), tmp_path / "model", network)


def test_inputs_that_come_with_an_export_archive_are_not_unpickled(tmp_path: Path) -> None:
    path = armed_export(tmp_path / "net.pt2", "data/sample_inputs/model.pt", lambda _: pickle.dumps(Bomb()))
    assert isinstance(open_export(path), nn.Module)


def test_what_is_packed_says_nothing_of_this_machine(tmp_path: Path) -> None:
    folder = pack(unet(), draft(), tmp_path / "model").model.folder
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        everything = b"".join(archive.read(name) for name in archive.namelist())
    assert b"site-packages" not in everything
    assert str(Path(__file__).parent.parent).encode() not in everything + (folder / "model.onnx").read_bytes()


class Bomb:
    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('code of a pickle was run')",)


def custom_operator(path: Path) -> Path:
    node = helper.make_node("Magic", ["x"], ["y"], domain="acme.ai")
    sizes = ["n", 2, "h", "w"]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, sizes)],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("acme.ai", 1)]), path)
    return path


def truncated(path: Path) -> Path:
    as_onnx(Plain().eval(), path)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def pickled(path: Path) -> Path:
    path.write_bytes(pickle.dumps(Bomb()))
    return path


def whole_module(path: Path) -> Path:
    torch.save(Plain(), path)
    return path


def not_tensors(path: Path) -> Path:
    torch.save({"a": 1}, path)
    return path


def garbage(path: Path) -> Path:
    path.write_bytes(b"\x00\x01nothing of use" * 99)
    return path


@pytest.mark.parametrize(
    ("write", "name", "words"),
    [
        (custom_operator, "a.onnx", "Magic.*acme.ai|acme.ai.*Magic"),
        (truncated, "a.onnx", "a.onnx"),
        (garbage, "a.onnx", "a.onnx"),
        (garbage, "a.safetensors", "is it whole"),
        (garbage, "a.bmp", "no network that segflow knows"),
        (garbage, "a.pt", "a.pt"),
        (pickled, "a.pt", "could run any code"),
        (whole_module, "a.pt", "could run any code"),
        (not_tensors, "a.pt", "holds no state dict"),
        (lambda path: path, "missing.onnx", "is no file"),
        (lambda path: as_export(Plain().eval(), path), "a.pt2", "may bring code along"),
    ],
)
def test_what_cannot_be_trusted_is_refused(
    tmp_path: Path, write: Callable[[Path], Path], name: str, words: str
) -> None:
    path = write(tmp_path / name)
    with pytest.raises(SegcoreError, match=words):
        pack(path, draft(), tmp_path / "model", OURS if path.suffix in (".pt", ".safetensors") else None)
    assert not (tmp_path / "model").exists()
    assert not list(tmp_path.glob(".model*"))


@pytest.mark.parametrize(
    "name",
    ["os.system", "subprocess.Popen", "monai.networks.nets.torch.load", "monai.networks.BasicUNet", "torch.nn.Conv2d",
     "segcore.model.unet", "monai.networks.nets", "segmentation_models_pytorch.encoders.get_encoder", ""],
)  # fmt: skip
def test_no_other_class_is_imported(name: str) -> None:
    with pytest.raises(CardError, match="is no network that segflow imports"):
        check_network({"name": name, "arguments": {}})


@pytest.mark.parametrize(
    "name", ["segcore.model.unet.ModelError", "segcore.model.unet.torch", "segcore.model.unet.Nothing"]
)
def test_only_networks_are_built(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CardError, match="is no network of segcore"):
        pack(tmp_path / "a.safetensors", draft(), tmp_path / "model", NetworkClass(name=name, arguments={}))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    save_file(unet().state_dict(), tmp_path / "a.safetensors")
    path = tmp_path / "a.safetensors"
    wider = OURS.model_copy(update={"arguments": OURS.arguments | {"widths": [4, 6, 9]}})
    with pytest.raises(ModelError, match=r"does not fit .*UNet"):
        pack(path, draft(), tmp_path / "model", wider)
    with pytest.raises(CardError, match="does not take"):
        pack(path, draft(), tmp_path / "model", OURS.model_copy(update={"arguments": {"colour": 1}}))
    with pytest.raises(CardError, match="without a network"):
        pack(path, draft(), tmp_path / "model")
    with pytest.raises(CardError, match="leave them out"):
        pack(path, draft(stride=[4, 4]), tmp_path / "model", OURS)
    with pytest.raises(CardError, match="3 scores for each pixel, and the draft names 4 classes"):
        pack(path, draft(classes=4), tmp_path / "model", OURS)
    with pytest.raises(ModelError, match="takes no image of 5 channels"):
        pack(path, draft(channels="abcde"), tmp_path / "model", OURS)
    with pytest.raises(CardError, match="classes"):
        pack(path, draft(classes=1), tmp_path / "model", OURS)
    assert not (tmp_path / "model").exists()


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match="is there already"):
        pack(unet(), draft(), tmp_path / "model")


def test_torchscript_with_another_digest_is_refused(tmp_path: Path) -> None:
    as_torchscript(Plain().eval(), tmp_path / "net.pt")
    pack(tmp_path / "net.pt", draft(), tmp_path / "model")
    other = Plain().eval()
    as_torchscript(other, tmp_path / "model" / "model.ts")
    with pytest.raises(CardError, match="not the weights that the card was made for"):
        load_segmenter(load_card(str(tmp_path / "model")), 2)


def test_the_command_packs_and_inspects(
    tmp_path: Path, run_segflow: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    save_file(unet().state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "draft.json").write_text(json.dumps(draft()))
    network = ("--network", OURS.name, "--arguments", json.dumps(OURS.arguments))
    source = ("model", "pack", tmp_path / "weights.safetensors", "--card", tmp_path / "draft.json")
    done = run_segflow(*source, "-o", tmp_path / "model", *network)
    assert done.returncode == 0, done.stderr
    assert "model.onnx, model.pt2, model.safetensors" in done.stdout
    seen = run_segflow("model", "inspect", tmp_path / "model", "--json")
    assert seen.returncode == 0, seen.stderr
    measured = json.loads(seen.stdout)["measured"]
    assert measured["reach"] == [[22, 22], [22, 22]]
    assert measured["halo"] == [[24, 24], [24, 24]]
    assert measured["work_by_core"]["512"] == pytest.approx((560 / 512) ** 2, abs=1e-3)
    card = json.loads((tmp_path / "model" / "card.json").read_text())
    (tmp_path / "model" / "card.json").write_text(json.dumps(card | {"reach": [10, 10]}))
    wrong = run_segflow("model", "inspect", tmp_path / "model")
    assert wrong.returncode == 1
    assert "gives a reach of 10 x 10, and the network's is 22 x 22" in wrong.stdout
    assert wrong.stdout.count("the card is wrong") == 1
    bad = run_segflow(*source, "-o", tmp_path / "other", "--network", "os.system")
    assert bad.returncode == 2
    assert "no network that segflow imports" in bad.stderr
