"""Flags that commands share, named as in timm's scripts, and what they mean as a `TrialSpec`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontok.cli.values import natural, positive, setting
from visiontok.errors import ParameterError

if TYPE_CHECKING:
    from visiontok.bench.clip_trial import ClipSpec
    from visiontok.bench.mllm_trial import MllmSpec
    from visiontok.bench.results import TrialSpec
    from visiontok.core.recipe import Recipe

BUDGETS = ("r", "keep", "gflops", "tokens")
TASKS = ("classify", "zeroshot", "retrieval", "vqa")
TOWERS = ("visual", "text", "both")
# Which of the flags of `add_clip`, and of those of the data, mean something for which tasks.
_FOR_TASKS = {
    "tower": ("zeroshot", "retrieval"),
    "class_names": ("zeroshot",),
    "templates": ("zeroshot",),
    "csv_img_key": ("retrieval",),
    "csv_caption_key": ("retrieval",),
    "class_map": ("classify",),
}
_BUDGET_HELP = {
    "r": "tokens removed per block: 13, '(16,-1)' (ToMe's inflection), '[8,8,4]' or '{3: 8}'",
    "keep": "kept per block: a share in (0, 1], or a whole number of tokens; lists and {layer: keep} too",
    "gflops": "target compute per image in GMACs (what papers call GFLOPs)",
    "tokens": "target number of patch tokens after the last block",
}


def add_model(
    parser: argparse.ArgumentParser, *, several: bool = False, clip: bool = False, mllm: bool = False
) -> None:
    """`-m --pretrained --checkpoint --img-size --input-size`.

    Args:
        parser: A command's parser.
        several: Several models.
        clip: Name the models of `add_clip` too, and take their tags.
        mllm: Name the multimodal models too.
    """
    group = parser.add_argument_group("model")
    name_help = "tiny_vit (default, embedded and trained), a timm name, or torchvision/NAME"
    if clip:
        name_help += "; for zeroshot and retrieval tiny_clip (default), an open_clip name, hf-hub:OWNER/NAME or hf:DIR"
    if mllm:
        name_help += "; multimodal: tiny-llava (embedded and trained) or hf:DIR"
    if several:
        group.add_argument("-m", "--model", nargs="+", metavar="NAME", help=name_help)
        group.add_argument("--model-list", metavar="FILE", help="file with one model name per line")
    else:
        group.add_argument("-m", "--model", metavar="NAME", help=name_help)
    if clip:
        group.add_argument(
            "--pretrained", nargs="?", const=True, default=False, metavar="TAG",
            help="load the pretrained weights of timm or torchvision, or open_clip's of that tag",
        )  # fmt: skip
    else:
        group.add_argument(
            "--pretrained", action="store_true", help="load the pretrained weights of timm or torchvision"
        )
    group.add_argument("--checkpoint", metavar="FILE", help="load these weights (.safetensors, or tensors-only .pth)")
    group.add_argument("--img-size", type=positive, metavar="N", help="square input size, None for the model's own")
    group.add_argument("--input-size", type=positive, nargs=3, metavar=("C", "H", "W"), help="full input size")


def add_reducer(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """`--reducer --r --keep --gflops --tokens --set --recipe`."""
    group = parser.add_argument_group("reduction")
    if several:
        group.add_argument("--reducer", nargs="+", metavar="NAME", help="registry names (default: tome pitome)")
    else:
        group.add_argument("--reducer", metavar="NAME", help="registry name, see 'visiontok list'")
    count: dict[str, Any] = {"nargs": "+"} if several else {}
    for name, text in _BUDGET_HELP.items():
        group.add_argument(f"--{name}", type=str, metavar="X", help=text, **count)
    group.add_argument(
        "--set", type=setting, action="append", default=[], metavar="K=V", help="another parameter of the reducer"
    )
    group.add_argument("--recipe", metavar="FILE", help="reducer, parameters and model from a recipe (configs/)")


def add_data(parser: argparse.ArgumentParser, *, loaders: str = "--workers") -> None:
    """`--data-dir --split --class-map --max-images --max-failed -j`; `loaders` is the long name of `-j`."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-dir", metavar="DIR", help="folder of class folders (default: the embedded digits, for tiny_vit)"
    )
    group.add_argument("--split", metavar="NAME", help="sub-folder of it (default: validation), or test|train")
    group.add_argument("--class-map", metavar="FILE", help="class folder names in the order of the model's outputs")
    group.add_argument("--max-images", type=positive, metavar="N", help="evaluate N evenly spaced images only")
    group.add_argument(
        "--max-failed", type=natural, default=0, metavar="N", help="unreadable images to accept (default: 0)"
    )
    group.add_argument("-j", loaders, dest="load_workers", type=natural, default=0, help="image loading processes")


def add_clip(parser: argparse.ArgumentParser) -> None:
    """`--task --tower --class-names --templates --csv-img-key --csv-caption-key`."""
    group = parser.add_argument_group("task")
    group.add_argument(
        "--task", choices=TASKS, default="classify", help="classify (default), zeroshot, retrieval or vqa"
    )
    group.add_argument("--tower", choices=TOWERS, help="encoder to reduce (visual)")
    group.add_argument(
        "--class-names", metavar="FILE", help="names in the sorted order of the class folders: lines, or a JSON list"
    )
    group.add_argument(
        "--templates",
        metavar="T",
        help="prompts: openai (default), simple, or a file with one per line",
    )
    group.add_argument("--csv-img-key", metavar="COLUMN", help="column of image paths (default: found by its name)")
    group.add_argument("--csv-caption-key", metavar="COLUMN", help="column of captions (default: found by its name)")


def add_run(parser: argparse.ArgumentParser, *, batch: int = 32, warm: int = 10, rounds: int = 40) -> None:
    """`-b --device --amp --model-dtype --channels-last --torchcompile --seed --threads ...` and the timing flags.

    Args:
        parser: a command's parser.
        batch: default of `--batch-size`.
        warm: default of `--num-warm-iter`.
        rounds: default of `--num-bench-iter`; 0 for a command that times nothing and has neither flag.
    """
    group = parser.add_argument_group("run")
    group.add_argument(
        "-b", "--batch-size", type=positive, default=batch, metavar="N", help=f"images per batch ({batch})"
    )
    group.add_argument("--device", default="cpu", help="torch device (cpu)")
    group.add_argument("--amp", action="store_true", help="run under autocast")
    group.add_argument("--amp-dtype", default="bfloat16", choices=("bfloat16", "float16"), help="autocast's dtype")
    group.add_argument(
        "--model-dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="dtype of the weights"
    )
    group.add_argument("--channels-last", action="store_true", help="channels-last memory format")
    group.add_argument(
        "--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile (backend: inductor)"
    )
    group.add_argument("--seed", type=natural, default=42, help="seed of random weights and inputs (42)")
    group.add_argument(
        "--threads", type=positive, metavar="N", help="intra-op threads; 1 times CPU time, not wall time"
    )
    group.add_argument("--no-retry", action="store_true", help="do not halve the batch when memory runs out")
    if rounds:
        group.add_argument(
            "--num-warm-iter", type=natural, default=warm, metavar="N", help=f"untimed calls of each model ({warm})"
        )
        group.add_argument(
            "--num-bench-iter", type=_rounds, default=rounds, metavar="N", help=f"interleaved rounds ({rounds})"
        )


def add_output(parser: argparse.ArgumentParser) -> None:
    """`--results-file --results-format --quiet`."""
    group = parser.add_argument_group("output")
    group.add_argument("--results-file", metavar="FILE", help="write the result row(s) here too")
    group.add_argument("--results-format", choices=("json", "jsonl", "csv"), help="default: by the file's suffix")
    group.add_argument("--quiet", action="store_true", help="no progress, no table; only the --result line")


def spec(args: argparse.Namespace, **fields: Any) -> TrialSpec:
    """The trial that the flags describe; `fields` win over flags."""
    from visiontok.bench.results import TrialSpec

    recipe = load_recipe(args)
    name = fields.pop("model", None) or model_name(args, recipe)
    if "reducer" not in fields:
        fields["reducer"], fields["params"] = reduction(args, recipe)
    return TrialSpec(model=name, **(common(args, name) | fields))


def clip_spec(args: argparse.Namespace) -> ClipSpec:
    """The trial of `--task zeroshot` or `retrieval` that the flags describe.

    Raises:
        ParameterError: there is no data for this model.
    """
    from visiontok.bench.clip_models import DEFAULT_CLIP
    from visiontok.bench.clip_trial import SCENES, ClipSpec

    recipe = load_recipe(args)
    name = args.model or (recipe.model if recipe is not None else DEFAULT_CLIP)
    reducer, params = reduction(args, recipe)
    tagged = isinstance(args.pretrained, str)
    values = common(args, name) | {"pretrained": bool(args.pretrained), "tag": args.pretrained if tagged else None}
    values["data"] = args.data_dir or (SCENES if name == DEFAULT_CLIP else "none")
    values["split"] = args.split or ("test" if values["data"] == SCENES else "validation")
    if values["data"] == "none":
        wanted = {"zeroshot": "a folder of class folders", "retrieval": "a .csv of images and captions, or a .tar"}
        raise ParameterError(f"{name} needs data; pass {wanted[args.task]} with --data-dir")
    return ClipSpec(
        model=name,
        reducer=reducer,
        params=params,
        timing=False,
        task=args.task,
        tower=args.tower or "visual",
        templates=args.templates,
        class_names=args.class_names,
        csv_img_key=args.csv_img_key,
        csv_caption_key=args.csv_caption_key,
        **values,
    )


def mllm_spec(args: argparse.Namespace, **fields: Any) -> MllmSpec:
    """The trial of a multimodal model that the flags describe; `fields` win over flags.

    Raises:
        ParameterError: a flag that is not for such models.
    """
    from visiontok.bench.mllm_models import DEFAULT_MLLM, canonical
    from visiontok.bench.mllm_trial import QUESTIONS, MllmSpec

    recipe = load_recipe(args)
    name = canonical(args.model or (recipe.model if recipe is not None else DEFAULT_MLLM))
    reducer, params = reduction(args, recipe)
    values: dict[str, Any] = common(args, name) | {"pretrained": bool(args.pretrained)}
    size = values.pop("input_size")
    values |= {"data": "none"} if size is None else {"data": "none", "image_size": size[1:]}
    if hasattr(args, "data_dir"):
        values["data"] = args.data_dir or (QUESTIONS if name == DEFAULT_MLLM else "none")
        values["split"] = args.split or "test"
    if getattr(args, "new_tokens", None) is not None:
        values["new_tokens"] = args.new_tokens
    return MllmSpec(model=name, reducer=reducer, params=params, **(values | fields))


def check_task(args: argparse.Namespace) -> None:
    """Refuses flags that mean nothing for the task.

    Raises:
        ParameterError: there is one.
    """
    for name, tasks in _FOR_TASKS.items():
        if getattr(args, name) is not None and args.task not in tasks:
            flag = name.replace("_", "-")
            raise ParameterError(f"--{flag} is for --task {' or '.join(tasks)}, not for {args.task}")
    if args.task in ("classify", "vqa") and isinstance(args.pretrained, str):
        raise ParameterError(
            f"--pretrained '{args.pretrained}' is a tag of open_clip, for --task zeroshot or retrieval; "
            "timm's is a part of the name: -m NAME.TAG --pretrained"
        )


def common(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Fields of a `TrialSpec` that do not hang on the reducer."""
    if args.img_size is not None and args.input_size is not None:
        raise ParameterError("give --img-size or --input-size, not both")
    size = tuple(args.input_size) if args.input_size else (3, args.img_size, args.img_size) if args.img_size else None
    values = {
        "pretrained": args.pretrained,
        "checkpoint": args.checkpoint,
        "input_size": size,
        "batch_size": args.batch_size,
        "device": args.device,
        "amp": args.amp,
        "amp_dtype": args.amp_dtype,
        "dtype": args.model_dtype,
        "channels_last": args.channels_last,
        "torchcompile": args.torchcompile,
        "seed": args.seed,
        "threads": args.threads,
        "retry": not args.no_retry,
    }
    if hasattr(args, "num_bench_iter"):
        values |= {"num_warm_iter": args.num_warm_iter, "num_bench_iter": args.num_bench_iter}
    if hasattr(args, "data_dir"):
        values |= _data(args, name)
    return values


def model_name(args: argparse.Namespace, recipe: Recipe | None = None) -> str:
    """The model asked for: `-m`, else the recipe's, else the embedded one."""
    from visiontok.bench.models import DEFAULT_MODEL

    return args.model or (recipe.model if recipe is not None else DEFAULT_MODEL)


def load_recipe(args: argparse.Namespace) -> Recipe | None:
    """The recipe asked for.

    Raises:
        ParameterError: it was given together with `--reducer`.
        FormatError: it cannot be read.
    """
    if args.recipe is None:
        return None
    if args.reducer:
        raise ParameterError("give --recipe or --reducer, not both; change a recipe's parameters with --set")
    from visiontok.core.recipe import load_recipe

    return load_recipe(args.recipe)


def reduction(args: argparse.Namespace, recipe: Recipe | None = None) -> tuple[str | None, dict[str, Any]]:
    """Reducer and parameters asked for; `(None, {})` for an unreduced model.

    Raises:
        ParameterError: parameters without a reducer.
    """
    given = {name: budget(getattr(args, name)) for name in BUDGETS if getattr(args, name) is not None}
    params = {**given, **dict(args.set)}
    if recipe is not None:
        kept = recipe.fields if given else recipe.params
        return recipe.method, {**kept, **params}
    if args.reducer is None and params:
        names = ", ".join(f"--{name}" if name in BUDGETS else f"--set {name}" for name in params)
        raise ParameterError(f"{names} needs a reducer; add --reducer NAME (see 'visiontok list')")
    return args.reducer, params


def budget(text: str) -> Any:
    """A budget as typed; see `visiontok.core.schedule.parse_budget`."""
    from visiontok.core.schedule import parse_budget

    return parse_budget(text)


def model_names(args: argparse.Namespace, fallback: Sequence[str]) -> list[str]:
    """The models of a sweep: `-m`, then the lines of `--model-list`, else `fallback`."""
    names = list(args.model or ())
    if args.model_list:
        path = Path(args.model_list)
        if not path.is_file():
            raise ParameterError(f"--model-list '{path}' does not exist")
        lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
        names += [line for line in lines if line]
    return list(dict.fromkeys(names)) or list(fallback)


def _data(args: argparse.Namespace, name: str) -> dict[str, Any]:
    from visiontok.bench.models import EMBEDDED

    data = args.data_dir or ("digits" if name in EMBEDDED else "none")
    return {
        "data": data,
        "split": args.split or ("test" if data == "digits" else "validation"),
        "class_map": args.class_map,
        "max_images": args.max_images,
        "workers": args.load_workers,
    }


def _rounds(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"timing needs at least 2 rounds, got {text}")
    return value
