"""The real `llmft` command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_SECONDS = 420


@dataclass(frozen=True)
class Answer:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of standard error."""
        return self.err.splitlines()


def llmft_path() -> str:
    """The console script beside this Python."""
    return str(Path(sys.executable).parent / "llmft")


def llmft(*args: str, folder: Path, environment: Mapping[str, str] | None = None) -> Answer:
    """Run `llmft ARGS` in a folder."""
    return _answer([llmft_path(), *args], folder, environment)


def altered_llmft(alteration: str, *args: str, folder: Path) -> Answer:
    """The same, where `alteration` (Python) has run in the process before."""
    program = folder / "altered.py"
    program.write_text(
        f"{alteration}\nimport sys\nfrom llmft_core.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    return _answer([sys.executable, str(program), *args], folder, None)


def _answer(command: Sequence[str], folder: Path, environment: Mapping[str, str] | None) -> Answer:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def ask_without_llmft(checkpoint: Path) -> str:
    """Load a checkpoint in a process that cannot import llmft, and generate three tokens; what it printed."""
    program = f"""
import sys
sys.modules["llmft_core"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(checkpoint)!r})
model = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})
assert model.get_input_embeddings().num_embeddings >= len(tokenizer)
chat = [{{"role": "user", "content": "How many?"}}]
text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=3, do_sample=False)
assert out.shape[1] > ids.shape[1]
assert tokenizer.convert_tokens_to_ids("<END_A>") in model.generation_config.eos_token_id
print(text, len(tokenizer), model.dtype)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
