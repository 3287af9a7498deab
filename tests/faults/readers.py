"""Everything that reads a file, each with the tiny files that its mutations are made of."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lowvram_video.framepack.run.folder import RunStore
from lowvram_video.framepack.streamed import StreamedFramePack
from lowvram_video.framepack.text.checkpoint import open_clip, open_llama, open_siglip
from lowvram_video.framepack.text.llama_gguf import gguf_tokenizer
from lowvram_video.framepack.text.tokenizer_files import (
    CLIP_TOKENIZER,
    LLAMA_TOKENIZER,
    WantedTokenizer,
    find_tokenizer,
)
from lowvram_video.framepack.vae.checkpoint import HUNYUAN_FORMAT
from lowvram_video.memory.plan.limits import limits_for
from lowvram_video.runtime.kept_runs import clean_runs
from lowvram_video.runtime.step_record import StepRecord
from lowvram_video.system.card_profile import load_profile
from lowvram_video.video.growing_video import GrowingVideo
from lowvram_video.wanvideo.footprint import wan_work
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.wanvideo.text.checkpoint import load_text_encoder
from lowvram_video.wanvideo.vae.checkpoint import WAN_FORMAT
from lowvram_video.weights.lora.file import LoraChoice
from safetensors.torch import load_file, save_file

from ..quantizers import quantize, write_gguf
from ..tiny_framepack import WIDE, save_framepack, save_framepack_gguf
from . import mutations
from .beside_models import beside_models
from .files import Files
from .parts import parts_of_models
from .reader import CPU, SETTINGS, SMALL_BYTES, NonFinite, Read, Reader, inspect, mutated, put

CARDS = Path(__file__).parents[2] / "benchmarks" / "cards"
MOST_SECTIONS = 10**8
RUN = {"seed": 1, "picture": torch.arange(4.0)}


def readers(files: Files, place: Path) -> Mapping[str, Reader]:
    """All of them; what they are made of is put into `place`."""
    made = _Made(files, place)
    single: dict[str, tuple[Path, tuple[Read, ...]]] = {
        "Wan": (files.model, (inspect, as_wan)),
        "FramePack": (files.framepack, (inspect, as_framepack)),
        "umt5": (files.folder / "umt5.safetensors", (inspect, load_text_encoder)),
        "Wan VAE": (files.folder / "vae.safetensors", (inspect, as_wan_vae)),
        "Hunyuan VAE": (files.folder / "hyvae.safetensors", (inspect, as_hunyuan_vae)),
        "LLaMA": (files.folder / "llava_llama3.safetensors", (inspect, open_llama)),
        "CLIP": (files.folder / "clip_l.safetensors", (inspect, open_clip)),
        "SigLIP": (files.folder / "sigclip.safetensors", (inspect, open_siglip)),
        "LoRA for Wan": (made.wan_lora, (inspect, with_lora(StreamedWan, files.model))),
        "LoRA for FramePack": (made.framepack_lora, (inspect, with_lora(StreamedFramePack, files.framepack))),
    }
    found = {name: Reader(mutated(path, mutations.safetensors), reads) for name, (path, reads) in single.items()}
    return {
        **found,
        "GGUF": Reader(mutated(made.gguf, mutations.gguf), (inspect, as_framepack)),
        "GGUF of umt5": Reader(mutated(made.umt5_gguf, mutations.gguf), (inspect, load_text_encoder)),
        "GGUF of LLaMA": Reader(mutated(made.umt5_gguf, mutations.gguf), (gguf_tokenizer, open_llama)),
        "index JSON": Reader(made.index, (inspect, as_framepack)),
        "shards": Reader(made.shards, (inspect, as_framepack)),
        "tokenizer.json": Reader(made.tokenizer, (tokenizer(LLAMA_TOKENIZER),)),
        "CLIP's vocabulary": Reader(made.vocabulary, (tokenizer(CLIP_TOKENIZER),)),
        "sentencepiece": Reader(made.spiece, (load_text_encoder,)),
        "adapter_config.json": Reader(made.adapter, (with_lora(StreamedWan, files.model),)),
        "FramePack's run folder": Reader(made.run, (take_up_run,)),
        "step record": Reader(made.record, (take_up_record,)),
        "card profile": Reader(made.profile, (load_profile,)),
        **parts_of_models(files, place / "parts"),
        **beside_models(place / "beside"),
    }


# --- reading ---------------------------------------------------------------------------------------------


def as_wan(path: Path) -> None:
    model = StreamedWan(path, SETTINGS)
    limits = limits_for(torch.device("cuda"), vram_budget_gib=4, ram_budget_gib=None, fused=True, measure=False)
    model.make_plan(wan_work(model.config, (48, 32, 5)), limits)


def as_framepack(path: Path) -> None:
    StreamedFramePack(path, SETTINGS)


def as_wan_vae(path: Path) -> None:
    WAN_FORMAT.open_file(path).build(torch.float32, CPU)


def as_hunyuan_vae(path: Path) -> None:
    HUNYUAN_FORMAT.open_file(path).build(torch.float32, CPU)


def with_lora(kind: Callable[..., Any], model: Path) -> Read:
    """The model with the file as a LoRA: what is made of its numbers is finite."""

    def read(path: Path) -> None:
        source = kind(model, SETTINGS, loras=(LoraChoice(path),)).weights.source
        for name, info in source.tensors.items():
            if "lora" not in name or info.nbytes >= SMALL_BYTES:
                continue
            stored = torch.empty(info.nbytes, dtype=torch.uint8)
            source.read_into(name, stored)
            if info.dtype.is_floating_point and not stored.view(info.dtype).float().isfinite().all():
                raise NonFinite(name)

    return read


def tokenizer(wanted: WantedTokenizer) -> Read:
    """The files in the folder as this tokenizer, and a prompt through it."""

    def read(folder: Path) -> None:
        find_tokenizer(wanted, folder, folder / "encoder.safetensors").encode("a red ball <|eot_id|> moves 123 left")

    return read


def take_up_run(folder: Path) -> None:
    """As a FramePack run that goes on: its sections, then its film."""
    with RunStore.open(folder / "runs", RUN, 3) as store:
        for index in range(store.completed):
            assert store.load(index).latents.shape == (1, 16, 2, 4, 6)
        film = GrowingVideo(store.folder / "film", folder / "film.mp4", 30, grows="front", made_by="vae")
        assert 0 <= film.num_sections <= MOST_SECTIONS and film.num_frames >= 0


def take_up_record(folder: Path) -> None:
    """As Wan's run that goes on: each answer is the recorded one, or made anew."""
    with StepRecord.open(folder / "wan", RUN) as record:
        for index in range(3):
            (answer,) = record.answers(
                {"x": torch.full((2,), float(index))}, lambda index=index: [torch.full((2,), index + 1.0)]
            )
            if answer.tolist() != [index + 1.0] * 2:
                raise NonFinite(f"answer {index} is {answer.tolist()}")
        record.finished()
    clean_runs(folder / "wan")


# --- what mutations are made of --------------------------------------------------------------------------


class _Made:
    """Files that `files.py` has not, made once."""

    def __init__(self, files: Files, place: Path) -> None:
        self._files, self._place = files, place
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        self.wan_lora = self._lora(place / "wan_lora.safetensors", "diffusion_model.blocks.0.self_attn.q", 128)
        dim = load_file(files.framepack)["transformer_blocks.0.attn.to_q.weight"].shape[0]
        self.framepack_lora = self._lora(place / "fp_lora.safetensors", "transformer_blocks.0.attn.to_q", dim)
        self.gguf, _ = save_framepack_gguf(place / "framepack.gguf", "Q8_0", WIDE)
        self.umt5_gguf = self._umt5_gguf(place / "umt5.gguf")
        self._shards = save_framepack(place / "shards", WIDE, layout="shards")
        self._run, self._record = place / "run", place / "record"
        self._make_run()
        self._make_record()

    def _lora(self, path: Path, layer: str, dim: int) -> Path:
        generator = torch.Generator().manual_seed(3)
        down, up = (torch.randn(shape, generator=generator) / 11 for shape in ((4, dim), (dim, 4)))
        save_file(
            {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up, f"{layer}.alpha": torch.tensor(4.0)}, path
        )
        return path

    def _umt5_gguf(self, path: Path) -> Path:
        """In llama.cpp's names, with a small tokenizer."""
        values = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
        tensors: dict[str, tuple[torch.Tensor, str]] = {"token_embd.weight": (quantize(values, "Q8_0"), "Q8_0")}
        tensors["enc.output_norm.weight"] = (values[0], "F32")
        for name in ("attn_q", "attn_k", "attn_v", "attn_o", "ffn_gate", "ffn_up", "ffn_down"):
            tensors[f"enc.blk.0.{name}.weight"] = (quantize(values, "Q8_0"), "Q8_0")
        tokens = ["<pad>", "</s>", "<unk>", "a", "b", "ab", "c", "d"]
        fields: dict[str, Any] = {"tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": tokens}
        fields["tokenizer.ggml.scores"] = [0.0] * 8
        fields["tokenizer.ggml.token_type"] = [3, 3, 2, 1, 1, 1, 1, 1]
        return write_gguf(path, tensors, "t5encoder", fields)

    def _make_run(self) -> None:
        generator = torch.Generator().manual_seed(2)
        with RunStore.open(self._run / "runs", RUN, 3) as store:
            for index in range(3):
                store.save_section(index, torch.randn(1, 16, 2, 4, 6, generator=generator), generator.get_state())
            film = GrowingVideo(store.folder / "film", self._run / "film.mp4", 30, grows="front", made_by="vae")
            for _ in range(2):
                film.add(torch.randint(0, 255, (9, 32, 48, 3), dtype=torch.uint8, generator=generator), 3)
            film.leave()

    def _make_record(self) -> None:
        with StepRecord.open(self._record / "wan", RUN) as record:
            for index in range(3):
                question = {"x": torch.full((2,), float(index))}
                record.answers(question, lambda index=index: [torch.full((2,), index + 1.0)])

    def index(self, folder: Path, draw: random.Random) -> Path:
        """An index beside its shards."""
        places = (
            "../../etc/passwd", "/etc/passwd", "..", ".", "", "a\0b", "x" * 300, "sub/m.safetensors",
            "C:\\x.safetensors",
            "..\\x", "dir", "\ud800", "CON", "~", "missing.safetensors", "m.gguf", "m.safetensors.index.json",
        )  # fmt: skip
        name = "diffusion_pytorch_model.safetensors.index.json"
        for shard in self._shards.glob("*.safetensors"):
            (folder / shard.name).hardlink_to(shard)
        (folder / "dir").mkdir()
        plain = (self._shards / name).read_text()
        if draw.random() < 0.4:
            return put(folder / name, mutations.json_text(plain, draw, places))
        value = json.loads(plain)
        keys = list(value["weight_map"])
        for key in draw.sample(keys, draw.choice([1, 2, len(keys)])):
            value["weight_map"][key] = draw.choice(places)
        return put(folder / name, json.dumps(value).encode())

    def shards(self, folder: Path, draw: random.Random) -> Path:
        """Shards of which one is gone, another's, misnamed or damaged."""
        found = [Path(shutil.copy(shard, folder)) for shard in sorted(self._shards.glob("*.safetensors"))]
        victim, kind = draw.choice(found), draw.randrange(5)
        if kind == 0:
            victim.unlink()
        elif kind == 1:
            victim.write_bytes(draw.choice(found).read_bytes())
        elif kind == 2:
            numbers = draw.choice(["00001-of-99999", "00000-of-00000", "00002-of-00001", "99999-of-00001"])
            return victim.rename(folder / f"m-{numbers}.safetensors")
        elif kind == 3:
            victim.unlink()
            victim.mkdir()
        else:
            victim.write_bytes(mutations.safetensors(victim.read_bytes(), draw))
        return folder if draw.random() < 0.5 else found[0]

    def tokenizer(self, folder: Path, draw: random.Random) -> Path:
        extra = (
            "Sequence", "Split", "ByteLevel", {"type": "Sequence", "pretokenizers": []}, {"Regex": "(a+)+$"},
            {"Regex": "\\p{Zzz}"}, {"Regex": "["}, {"Regex": "(" * 5000}, {"Regex": "a{99999999}"}, [["a", "b"]],
            ["a b"], [None], {"a": -1}, {"a": "x"}, {"a": 2**70}, {"a": 10**9},
        )  # fmt: skip
        return self._text(folder, "tokenizer/tokenizer.json", draw, extra)

    def vocabulary(self, folder: Path, draw: random.Random) -> Path:
        source, target = self._files.folder / "tokenizer_2", folder / "tokenizer_2"
        shutil.copytree(source, target)
        if draw.random() < 0.5:
            (target / "vocab.json").write_bytes(mutations.json_text((source / "vocab.json").read_text(), draw))
        else:
            (target / "merges.txt").write_bytes(mutations.any_bytes((source / "merges.txt").read_bytes(), draw))
        return folder

    def _text(self, folder: Path, name: str, draw: random.Random, extra: Sequence[Any]) -> Path:
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(mutations.json_text((self._files.folder / name).read_text(), draw, extra))
        return folder

    def spiece(self, folder: Path, draw: random.Random) -> Path:
        """A damaged sentencepiece model, in the encoder's file or beside it."""
        tensors = load_file(self._files.folder / "umt5.safetensors")
        spiece = mutations.any_bytes(tensors.pop("spiece_model").numpy().tobytes(), draw)
        if draw.random() < 0.5:
            (folder / "spiece.model").write_bytes(spiece)
        else:
            tensors["spiece_model"] = torch.frombuffer(bytearray(spiece or b"\0"), dtype=torch.uint8)
        save_file(tensors, folder / "umt5.safetensors")
        return folder / "umt5.safetensors"

    def adapter(self, folder: Path, draw: random.Random) -> Path:
        plain = json.dumps({"r": 4, "lora_alpha": 8, "alpha_pattern": {"q": 2}, "rank_pattern": {}, "use_rslora": True})
        extra = ({"(a+)+$": 1}, {"[": 2}, {"a" * 10**5: 1}, {"q": 1e300}, {"q": "x"}, "NaN", -4)
        tensors = load_file(self.wan_lora)
        save_file({name: tensor for name, tensor in tensors.items() if "alpha" not in name}, folder / "m.safetensors")
        (folder / "adapter_config.json").write_bytes(mutations.json_text(plain, draw, extra))
        return folder / "m.safetensors"

    def run(self, folder: Path, draw: random.Random) -> Path:
        """A run of FramePack, of which one file is damaged."""
        shutil.copytree(self._run, folder, dirs_exist_ok=True)
        (run,) = (folder / "runs").iterdir()
        kind = draw.randrange(5)
        sections = sorted(run.glob("section_*"))
        if kind <= 1:
            section = draw.choice(sections)
            section.write_bytes(mutations.safetensors(section.read_bytes(), draw))
        elif kind == 2:
            (run / "settings.json").write_bytes(mutations.json_text((run / "settings.json").read_text(), draw))
        elif kind == 3:
            note, extra = run / "film" / "film.json", ("../../../etc/passwd", "/etc/passwd", 0, 3, 99, [])
            note.write_bytes(mutations.json_text(note.read_text(), draw, extra))
        else:
            part = draw.choice(sorted((run / "film").iterdir()))
            part.write_bytes(mutations.any_bytes(part.read_bytes() or b"\0", draw))
        return folder

    def record(self, folder: Path, draw: random.Random) -> Path:
        """A record of Wan's steps, of which one file is damaged or another's."""
        shutil.copytree(self._record, folder, dirs_exist_ok=True)
        (run,) = (folder / "wan").iterdir()
        steps = sorted(run.glob("step_*"))
        step, kind = draw.choice(steps), draw.randrange(4)
        if kind <= 1:
            step.write_bytes(mutations.safetensors(step.read_bytes(), draw))
        elif kind == 2:
            step.write_bytes(draw.choice(steps).read_bytes())
        else:
            (run / "run.json").write_bytes(mutations.json_text((run / "run.json").read_text(), draw))
        return folder

    def profile(self, folder: Path, draw: random.Random) -> Path:
        card = CARDS / "nvidia-h200.json"
        return put(folder / "card.json", mutations.json_text(card.read_text(encoding="utf-8"), draw))
