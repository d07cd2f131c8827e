"""`llmft generate CHECKPOINT PROMPT`: an answer from a checkpoint, prompted as it was trained."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft_core.cli.flags import Parser
from llmft_core.cli.reach import Reached, add_base_flag, reach_more
from llmft_core.errors import InputError

if TYPE_CHECKING:
    from llmft_core.merge import Adapted

PROG = "llmft generate"


def run_command(argv: Sequence[str], environ: Mapping[str, str], folder: Path) -> int:
    """Returns the exit code; raises LlmftError."""
    parser = Parser(
        prog=PROG,
        usage=f"{PROG} CHECKPOINT PROMPT [flags]",
        description="Answer a prompt from a complete checkpoint, prompted as it was trained.",
    )
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="folder or URI of a checkpoint")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to ask")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer in tokens [256]")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: the likeliest token always [0]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of sampling [0]")
    parser.add_argument("--raw", action="store_true", help="the prompt as it is, without the chat template")
    add_base_flag(parser, "where CHECKPOINT is an adapter: ")
    reached = reach_more(parser, argv, environ, folder, check_flags)
    if reached is None:
        return 0
    own = reached.own
    from llmft_core.checkpoint.stored import pull
    from llmft_core.merge import adapted

    place = reached.places.place(own.checkpoint)
    adapter = adapted(place)  # refuses what is not complete
    local = Path(own.checkpoint)
    if local.is_dir():
        print(answer(local, load(local, adapter, reached), own))
        return 0
    with tempfile.TemporaryDirectory(prefix="llmft-generate-") as scratch:
        fetched = Path(scratch) / "checkpoint"
        pull(place, fetched)
        print(answer(fetched, load(fetched, adapter, reached), own))
    return 0


def load(folder: Path, adapter: Adapted | None, reached: Reached) -> Any:
    """The model of a checkpoint, or of an adapter and its base. Raises InputError where there is no base."""
    from transformers import AutoModelForCausalLM

    named = reached.own.base
    if adapter is None:
        if named:
            raise InputError(f"--base {named}: {reached.own.checkpoint} is a whole model, not an adapter")
        return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    from llmft_core.checkpoint.snapshot import written_dtype
    from llmft_core.merge import base_of, merged_model

    plan = reached.plan(named or adapter.plan.model.name)
    base = base_of(adapter, plan, named, reached.catalog, reached.places)
    return merged_model(folder, adapter, base.path, reached.catalog, written_dtype(adapter.plan))


def check_flags(own: argparse.Namespace) -> None:
    """Raises InputError."""
    if not own.checkpoint or not own.prompt:
        raise InputError(f"generate needs a checkpoint and a prompt: {PROG} CHECKPOINT 'PROMPT'")
    if own.max_new_tokens < 1 or not 0 <= own.temperature < math.inf:
        raise InputError("--max-new-tokens is at least 1 and --temperature a number of at least 0")


def answer(folder: Path, model: Any, args: argparse.Namespace) -> str:
    """The model's answer to one prompt, its special tokens left out."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    if tokenizer.chat_template and not args.raw:
        messages = [{"role": "user", "content": args.prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    else:
        ids = tokenizer(args.prompt, return_tensors="pt").input_ids
    torch.manual_seed(args.seed)
    longest = getattr(model.config, "max_position_embeddings", None) or math.inf
    room = longest - ids.shape[1]
    if room < 1:
        raise InputError(f"the prompt has {ids.shape[1]} tokens, the model {longest} positions: shorten the prompt")
    new_tokens = int(min(args.max_new_tokens, room))  # beyond its positions a model answers nonsense, or fails
    if new_tokens < args.max_new_tokens:
        print(
            f"warning: the answer has at most {new_tokens} tokens, not {args.max_new_tokens}: the model has {longest} "
            f"positions, the prompt takes {ids.shape[1]}",
            file=sys.stderr,
        )
    settings: dict[str, Any] = {"do_sample": args.temperature > 0, "max_new_tokens": new_tokens}
    if args.temperature > 0:
        settings["temperature"] = args.temperature
    ids = ids.to(device)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.pad_token_id, **settings)
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return str(text).strip()
