"""The command line: a thin layer, as each command imports what it needs only when it is called."""

import json
import logging
import os
import re
import shlex
import signal
import sys
import time
import traceback
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longwave import own
from longwave.errors import clipped

if TYPE_CHECKING:
    from longwave.tokenizer import Tokenizer
    from longwave.train import Recipe

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Long-sequence models: train, evaluate and generate, on a laptop or on GPUs.\n\n"
    "Start with `longwave train demo`, then `longwave list`. Any command takes `--debug` to show an error's traceback.",
)

Weights = Annotated[
    str | None, typer.Option(help="int8 or bf16: keep the weights in so many bits; a token costs their bytes.")
]
Trained = Annotated[
    Path, typer.Argument(help="A run (its best checkpoint is taken), one of its checkpoints, or a saved model.")
]


def _allowed(value: str | list[str] | None) -> str | list[str] | None:
    """What the caller wrote: files of classes that it names are allowed by that."""
    own.trust_named([value] if isinstance(value, str) else value or [])
    return value


Words = Annotated[
    str | None,
    typer.Option(help="What made the model's token ids, where its folder does not say: as of longwave tokenize."),
]
Changes = Annotated[
    list[str] | None, typer.Argument(help="Changes such as lr=3e-3 or task.length=1024.", callback=_allowed)
]


@app.callback()
def trusted(
    trust: Annotated[
        list[Path] | None, typer.Option(help="A Python file to run first, for the classes in it; may be repeated.")
    ] = None,
) -> None:
    """What stands before every command."""
    for file in trust or []:
        try:
            own.trust(file)
        except ValueError as error:
            raise ValueError(f"--trust {error}") from error


UsageError: Any = typer.BadParameter.__base__  # of click, or of typer's own copy of it, by typer's version
Stopped: Any = typer.Abort  # what becomes of KeyboardInterrupt in there


def main() -> None:
    """Run the command line; an error is one or two lines and exit code 2."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    # Before torch is imported: threads that wait by spinning lose most of a core they share (measured: 27 times slower
    # training on two cores of which another process takes one).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for name in ("distributed", "rank_zero"):  # their banners
        logging.getLogger(f"lightning_fabric.utilities.{name}").setLevel(logging.WARNING)
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="longwave", standalone_mode=False))
    except BrokenPipeError:  # who read our output has enough of it; nothing is left to be flushed at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (KeyboardInterrupt, Stopped):
        sys.exit(128 + signal.SIGINT)
    except (UsageError, ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        message = str(error)
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", message):
            raise
        if isinstance(error, MemoryError | RuntimeError):
            message = f"out of memory: {message.splitlines()[0]}; make batch, lengths or the model smaller"
        if isinstance(error, UsageError):
            path = "longwave" if error.ctx is None else error.ctx.command_path
            message = f"{clipped(error.format_message().rstrip('.'))}; see {path} --help"
        if debug:
            traceback.print_exc()
        else:
            _note(f"error: {message}")
        sys.exit(2)


@app.command(
    epilog="Examples:\n\n"
    "- `longwave train demo`\n\n"
    "- `longwave train demo task.files=[my.txt] steps=2000 --out runs/mine`\n\n"
    "- `longwave train demo devices=2 strategy=fsdp2`\n\n"
    "- `longwave train demo --dry-run`\n\n"
    "- `longwave train my.yaml model=null --from imported --out runs/tuned`\n\n"
    "- `longwave train --resume runs/mine`"
)
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A shipped recipe (longwave list) or a YAML file.", callback=_allowed)
    ] = None,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/RECIPE.")] = None,
    resume: Annotated[Path | None, typer.Option(help="A run, or one of its checkpoints, to go on from.")] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", help="A run or a saved model to start from; model=null takes its model.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it costs: memory, time, steps.")] = False,
) -> None:
    """Train a model by a recipe; Ctrl-C saves, and --resume goes on exactly."""
    from longwave.models.runs import CONFIG, run_of
    from longwave.train import loop
    from longwave.train.config import load_recipe
    from longwave.train.memory import keep_freed_memory
    from longwave.train.ranks import RankError

    every = [*([] if recipe is None else [recipe]), *(changes or [])]
    source: str | Path | None = every.pop(0) if every and "=" not in every[0] else None
    if from_ is not None:
        if resume is not None:
            raise ValueError(f"--resume goes on with what the run started from; leave out --from {from_}")
        every.insert(0, f"start={json.dumps(str(from_.absolute()))}")
    if resume is not None:
        run = run_of(resume)
        if out is not None and out != run:
            raise ValueError(f"--resume goes on in {run}; leave out --out {out}")
        if not (run / CONFIG).is_file():
            instead = "" if source is None else f"; a new one is started by --out {run}"
            raise ValueError(f"{run} is no run: it has no {CONFIG}{instead}")
        loaded = load_recipe(source or run / CONFIG, every)
    else:
        if source is None:
            raise ValueError("name a recipe (longwave list shows them) or a run by --resume")
        loaded = load_recipe(source, every, dry=dry_run)
        run = out or Path("runs") / Path(source).stem
    if dry_run:
        from longwave.train.cost import cost, describe, measure

        if resume is None:
            loop.check_start(loaded)
        known = cost(loaded)
        print(describe(loaded, known, measure(loaded, known)))
        return
    go_on = f"{_again()} train --resume {shlex.quote(str(run))}"
    if loaded.keep_memory:
        keep_freed_memory()
    try:
        command = shlex.join(["longwave", "train", *([] if source is None else [str(source)]), *every])
        metrics = loop.train(loaded, run, resume=resume, command=command)
    except loop.Interrupted as stop:
        _note(f"\ninterrupted after step {stop.step}; everything is saved. Go on with\n  {go_on}")
        raise typer.Exit(128 + stop.number) from stop
    except KeyboardInterrupt:
        if (run / CONFIG).is_file():
            _note(f"\nstopped at once: what was not yet saved is lost. Go on with\n  {go_on}")
        raise
    except OSError as error:
        then = "; " if isinstance(error, RankError) else "\nwhen that is mended, "
        hint = f"{then}go on with {go_on}" if (run / CONFIG).is_file() else ""
        raise OSError(f"{error}{hint}") from error
    _report(loaded, run, metrics)


@app.command(
    epilog="Examples:\n\n- `longwave sweep recall model.pattern=[[s4d],[h3]] lr=1e-3,4e-3 seed=0,1,2 --jobs 2`"
)
def sweep(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe or a YAML file.", callback=_allowed)],
    changes: Annotated[
        list[str], typer.Argument(help="Changes with values to choose from: lr=1e-3,3e-3.", callback=_allowed)
    ],
    jobs: Annotated[int, typer.Option(min=1, max=1024, help="Runs at a time.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; default sweeps/RECIPE.")] = None,
) -> None:
    """Train every combination of some changes; mean and deviation over seeds. Asked again, it goes on where it was."""
    from longwave.results import sweep as grids

    folder = out or Path("sweeps") / Path(recipe).stem
    runs = grids.plan(recipe, changes, folder)
    outcomes, stopped = grids.sweep(recipe, runs, jobs, _note)
    task = runs[0].recipe.task
    print(grids.describe(outcomes, task.metric, task.higher_is_better))
    _note(f"runs: {folder}   what each said: {folder}/*.log")
    if stopped or any(outcome.error is not None for outcome in outcomes):
        raise typer.Exit(128 + stopped if stopped else 1)


@app.command(
    epilog="Examples:\n\n- `longwave table runs/demo sweeps/recall/*/`\n\n"
    "- `longwave table runs/demo --save docs/results.jsonl`\n\n- `longwave table --check`"
)
def table(
    runs: Annotated[list[Path] | None, typer.Argument(help="Runs; those of a sweep's seeds are one row.")] = None,
    save: Annotated[Path | None, typer.Option(help="A file of JSON lines to put the rows in.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Derive all tables of README.md and docs anew.")] = False,
    write: Annotated[bool, typer.Option("--write", help="The same, and write what differs.")] = False,
) -> None:
    """Runs as rows of Markdown: command, commit, minutes, parameters, metric, paper; or pages against their rows."""
    from longwave.results import table as tables

    if check or write:
        differ = [(page, made) for page, text, made in tables.derived(Path()) if made != text]
        for page, made in differ if write else []:
            page.write_text(made)
        if differ and not write:
            raise ValueError(
                f"{', '.join(str(p) for p, _ in differ)}: not the tables of their rows; longwave table --write"
            )
        _note(f"{len(differ)} pages written" if write else "all tables are those of their rows")
        return
    if not runs:
        raise ValueError("name runs, or --check to derive the tables of README.md and docs anew")
    rows = [tables.row(run) for run in runs if not run.is_file()]
    print(tables.markdown(rows))
    if save is not None:
        tables.save(rows, save)


@app.command(
    epilog="Examples:\n\n- `longwave report runs/demo`\n\n- `longwave report sweeps/recall/*/ --out page.html`"
)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Runs, side by side.")],
    out: Annotated[Path, typer.Option(help="The page, one file that needs no network.")] = Path("report.html"),
) -> None:
    """Runs on one page: curves, tables, what each gets right and where, samples, filters at start and end."""
    from longwave.results.report import report as write

    write([run for run in runs if not run.is_file()], out)
    _note(f"page: {out}")


@app.command(
    epilog="Examples:\n\n"
    "- `longwave eval runs/demo`\n\n"
    "- `longwave eval runs/demo --carry`\n\n"
    "- `longwave eval runs/induction_mamba --lengths 256,4096,65536`\n\n"
    "- `longwave eval runs/mine --tasks boolq,copa,lambada_openai --shots 3`\n\n"
    "- `longwave eval distilled 'task={kind: text, files: [my.txt]}'`"
)
def eval(
    run: Trained,
    changes: Changes = None,
    weights: Weights = None,
    tokenizer: Words = None,
    carry: Annotated[
        bool, typer.Option("--carry", help="Whole documents, the state going on from row to row; of text and tokens.")
    ] = False,
    lengths: Annotated[str | None, typer.Option(help="Of tasks with an eval_length: such as 256,4096,65536.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Of lm-eval (extra eval), such as boolq,copa.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples before each question of --tasks.")] = None,
    task_files: Annotated[Path | None, typer.Option(help="Folder of YAML files that --tasks are of, alone.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each of --tasks at most.")] = None,
) -> None:
    """Evaluate a trained model on the held-out data of its task, or on a changed one; on one device by default.

    With --weights, also the model whose weights are kept in so many bits, and how far its logits are from the others.
    """
    from longwave.train.evaluate import compare, evaluate, evaluate_carried, evaluate_lengths
    from longwave.train.loop import Objective, make_fabric, threads
    from longwave.train.memory import keep_freed_memory
    from longwave.train.ranks import Ranks
    from longwave.train.runs import check_tokenizer, load_run, tokenizer_of

    if tasks is not None:
        from longwave.models import LM
        from longwave.results.harness import ask

        _, model = load_run(run, [], weights)
        words = tokenizer_of(run) if tokenizer is None else _tokenizer(tokenizer)
        if words is None or not isinstance(model, LM):
            raise ValueError(f"{run}: --tasks are for language models whose tokenizer is known; give it by --tokenizer")
        for name, found in ask(model, words, tasks.split(","), shots, task_files, limit).items():
            print(f"{name}  " + "  ".join(f"{metric} {value:.4f}" for metric, value in found.items()), flush=True)
        return
    recipe, model = load_run(run, ["devices=1", "nodes=1", "strategy=auto", *(changes or [])])
    if recipe is None:
        raise ValueError(
            f"{run} is a saved model, which knows no task: say what to evaluate it on, such as "
            "'task={kind: text, files: [my.txt]}'"
        )
    if carry + (lengths is not None) + (weights is not None) > 1:
        raise ValueError("--carry, --lengths and --weights are three questions; ask one at a time")
    if not re.fullmatch(r"\d+(,\d+)*", lengths or "1"):
        raise ValueError(f"--lengths {lengths}: write whole numbers with commas, such as 256,4096")
    recipe.task.prepare()
    if changes or tokenizer is not None:
        check_tokenizer(run, tokenizer_of(run) if tokenizer is None else _tokenizer(tokenizer), recipe.task)
    if recipe.keep_memory:
        keep_freed_memory()
    with threads(recipe.threads), Ranks(make_fabric(recipe)) as ranks:
        fabric, batch = ranks.fabric, recipe.eval_batch or recipe.batch
        start = time.monotonic()
        objective = fabric.setup(Objective(model)).eval()
        if lengths is not None:
            asked = [int(length) for length in lengths.split(",")]
            for length, found in evaluate_lengths(fabric, objective, recipe.task, batch, asked):
                print(
                    f"{length:>10,}  " + "  ".join(f"{name} {value:.6g}" for name, value in found.items()), flush=True
                )
            return
        if carry:
            metrics = evaluate_carried(fabric, model, recipe.task)
        else:
            metrics = evaluate(fabric, objective, recipe.task, batch)
        if weights is not None:
            _, small = load_run(run, [], weights)
            other = evaluate(fabric, fabric.setup(Objective(small)).eval(), recipe.task, batch)
            other |= compare(model, small, fabric.to_device(recipe.task.eval_batch(batch, 0)))
            metrics |= {f"{name}, {weights}": value for name, value in other.items()}
    if ranks.main:
        for name, value in metrics.items():
            print(f"{name.replace('_', ' ')}  {value:.6g}")
    _note(f"{time.monotonic() - start:.1f} s")


@app.command(
    epilog="Examples:\n\n"
    '- `longwave generate runs/demo --prompt "Emma had" --max-new 400 --temperature 0.8`\n\n'
    "- `cat letter.txt | longwave generate runs/mine --max-new 1000`"
)
def generate(
    run: Trained,
    prompt: Annotated[str | None, typer.Option(help="Text to go on from; default standard input.")] = None,
    max_new: Annotated[int, typer.Option(help="Most tokens to write.")] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token each time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k most probable tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw among the fewest tokens whose probabilities reach p.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Draw among tokens at least this share as probable as the first.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens that were seen become rarer.")] = 1.0,
    stop: Annotated[str | None, typer.Option(help="End after this text.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws, to have the same text again.")] = None,
    from_state: Annotated[Path | None, typer.Option(help="Go on behind the text of a saved state.")] = None,
    save_state: Annotated[Path | None, typer.Option(help="Save the state at the end, to go on from it.")] = None,
    weights: Weights = None,
    tokenizer: Words = None,
    out: Annotated[Path | None, typer.Option(help="Of a model of sound: the file to write, such as x.wav.")] = None,
    seconds: Annotated[float, typer.Option(help="Of sound, how long.")] = 1.0,
) -> None:
    """Stream text from a trained model, through its recurrent state; or write sound from one of sound.

    Text is until the end of a document, which models of corpora have; names of special tokens in the prompt stand for
    these.
    """
    from rich.console import Console
    from rich.progress import Progress

    from longwave import models
    from longwave.inspection import describe_states
    from longwave.models.generate import PREFILL_CHUNK
    from longwave.tasks import AudioTokens
    from longwave.tokenizer import Decoder
    from longwave.train.runs import load_run, tokenizer_of, without_tokenizer

    recipe, model = load_run(run, [], weights)
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    if recipe is not None and isinstance(recipe.task, AudioTokens):
        return _generate_sound(recipe.task, model, out, seconds, options)
    if out is not None:
        raise ValueError(f"--out {out} is for models of sound; text goes to standard output")
    if not isinstance(model, models.LM):
        raise ValueError(f"{run} is a {type(model).__name__}, which tells no text; generate works on language models")
    words = tokenizer_of(run) if tokenizer is None else _tokenizer(tokenizer)
    if words is None:
        raise ValueError(without_tokenizer(run, None if recipe is None else recipe.task))
    words.check_fits(model.vocab, str(run))
    if prompt is None and from_state is None and sys.stdin.isatty():
        _note("type the text to go on from, then Enter and Ctrl-D")
    behind = from_state is not None and (prompt is None and sys.stdin.isatty())
    text = b"" if behind else sys.stdin.buffer.read() if prompt is None else os.fsencode(prompt)
    prompt_ids = words.prompt(text, begins=from_state is None)
    if not prompt_ids and from_state is None:
        raise ValueError("the prompt is empty: give --prompt TEXT or text on standard input")
    if stop == "":
        raise ValueError("--stop is empty: give a text to end after, or leave it out")
    options |= {"repetition_penalty": repetition_penalty, "stop": [] if words.end is None else [words.end]}
    if save_state is not None and (save_state.is_dir() or not save_state.absolute().parent.is_dir()):
        raise ValueError(f"--save-state {save_state} is no file that can be written: its folder must exist")
    if from_state is not None:
        options["state"], _ = models.load_state(from_state, model)
    token, written, start = None, 0, time.monotonic()
    with Progress(console=Console(stderr=True), transient=True, disable=len(prompt_ids) <= PREFILL_CHUNK) as bar:
        reading = bar.add_task("reading the prompt", total=len(prompt_ids))
        options["progress"] = lambda done, total: bar.update(reading, completed=done, total=total)
        tokens = models.stream(model, [prompt_ids], max_new, **options)
        first = list(islice(tokens, 1))  # what it objects to comes before anything is printed
    begin = tokens.state
    if prompt is not None:
        print(text.decode("utf-8", "replace"), end="", flush=True)
    behind_ids = options["state"].last[0].tolist() if from_state is not None else []
    decoder = Decoder(words, behind_ids + prompt_ids, stop)
    for (token,) in chain(first, tokens):
        assert token is not None
        written += 1
        print(decoder.push(token), end="", flush=True)
        if decoder.stopped:
            tokens.close()
            break
    print(decoder.rest())
    if save_state is not None:
        models.save_state(save_state, tokens.held, model)
        _note(f"state: {save_state}; go on with {_again()} generate {run} --from-state {save_state}")
    took = time.monotonic() - start
    ended = ", to the end of the document" if token is not None and token == words.end else ""
    _note(f"\n{written} tokens in {took:.1f} s, {written / max(took, 1e-9):,.0f} a second{ended}")
    if begin is not None and written > 1:
        _note(describe_states(model.backbone.mixers, begin.layers, tokens.state.layers))
    _note(f"run: {run}")
    _note_own_text()


def _generate_sound(task: Any, model: Any, out: Path | None, seconds: float, options: dict[str, Any]) -> None:
    """Write what a model of sound makes of silence."""
    from rich.progress import track

    from longwave import models
    from longwave.tasks import audio

    if out is None:
        raise ValueError("a model of sound writes a file: give --out x.wav")
    audio.check_name(out)
    count = round(seconds * task.rate)
    if count < 1:
        raise ValueError(f"--seconds {seconds:g} is no sample at {task.rate} a second; make it longer")
    tokens = models.stream(model, [[task.levels // 2]], count, **options)
    ids = [token for (token,) in track(tokens, "making sound", total=count) if token is not None]
    task.save(ids, out)
    _note(f"{len(ids):,} samples at {task.rate:,} a second: {out}")


@app.command(epilog="Examples:\n\n- `longwave distill runs/mine --order 16 --out distilled`")
def distill(
    run: Trained,
    out: Annotated[Path, typer.Option(help="Folder for the new model, which longwave.models.load reads.")],
    order: Annotated[int, typer.Option(help="State size of every fitted filter, even.")] = 16,
) -> None:
    """Fit filters without a state space, as those of hyena, by a few modes each: a model of constant state."""
    from longwave import models

    if out.exists():
        raise ValueError(f"{out} is there already; name another --out")
    result = models.distill(*models.load(run), order)
    models.save(out, result.model, result.spec, models.tokenizer(run))
    print(f"{'error of':32}{'median':>12}{'greatest':>12}")
    for name, errors in result.filters.items():
        print(f"{name:32}{errors.median().item():12.2e}{errors.max().item():12.2e}")
    print(f"{'logits':32}{result.logits:12.2e}")
    _note(f"model: {out}; eval, inspect and generate take it as they take a run")


@app.command(
    "import",
    epilog="Examples:\n\n- `longwave import downloads/mamba-130m --to mamba-130m`\n\n"
    "- `longwave import RWKV-4-Pile-169M.pth --from rwkv4_blinkdl --to rwkv`\n\n"
    "- `longwave import state-spaces/mamba-130m-hf --to mamba-130m`",
)
def import_(
    path: Annotated[str, typer.Argument(help="Weights, a folder with them and config.json, or OWNER/NAME on the Hub.")],
    changes: Annotated[list[str] | None, typer.Argument(help="Official options that no file says, key=value.")] = None,
    to: Annotated[Path, typer.Option(help="Folder for the model.")] = ...,  # type: ignore[assignment]
    format: Annotated[
        str | None, typer.Option("--from", help="Whose model it is, such as mamba_hf; default what its files say.")
    ] = None,
    tokenizer: Words = None,
) -> None:
    """Make a published checkpoint an ordinary model: eval, generate, inspect and train take it."""
    from longwave.models import load
    from longwave.official.importing import check, import_model
    from longwave.train.config import fields

    if to.exists():
        raise ValueError(f"{to} is there already; name another folder by --to")
    words = None if tokenizer is None else _tokenizer(tokenizer)
    made = import_model(path, to, format, words, **fields(changes or []))
    print(f"format      {made.format}\nkeys        {made.keys:,}, all used")
    for line in check(*load(to)):
        print(line)
    if made.tokenizer is not None:
        print(f"tokenizer   not beside the weights; the model was trained with {made.tokenizer}")
    _note(f"model: {to}; eval, generate, inspect and train take it as they take a run")


@app.command(
    epilog="Examples:\n\n- `longwave export runs/demo --to program --out exported`\n\n"
    "- `longwave export runs/mine --to hf --out mine-hf`"
)
def export(
    run: Trained,
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    to: Annotated[
        str,
        typer.Option(
            help="program: torch.export's .pt2 files, which need torch alone to run; hf: a folder that a class of "
            "transformers opens, where there is one that computes the model."
        ),
    ],
) -> None:
    """Write a model for those who have no longwave."""
    from longwave.errors import choose
    from longwave.models.export import export_programs
    from longwave.official.exporting import export_hf

    write = choose("--to", to, {"program": export_programs, "hf": export_hf})
    if out.exists():
        raise ValueError(f"{out} is there already; name another --out")
    _note(f"{out}: {', '.join(map(str, write(run, out)))}")


@app.command(epilog="Examples:\n\n- `longwave data pathfinder size=128 --count 20000 --out pathx --jobs 2`")
def data(
    task: Annotated[str, typer.Argument(help="A task that draws its examples: listops or pathfinder.")],
    out: Annotated[Path, typer.Option(help="Folder to fill; what is whole in it stays.")],
    changes: Annotated[list[str] | None, typer.Argument(help="Options of the task, key=value.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Examples of the training set.")] = 10000,
    held_out: Annotated[
        int | None, typer.Option(min=1, help="Of the validation and the test set each; default a tenth.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=1024, help="Threads.")] = 1,
) -> None:
    """Draw a task's examples once, into a folder that training reads (task.folder=DIR); goes on where it stopped.

    Beside them lies sample.png, some of them to look at.
    """
    from rich.console import Console
    from rich.progress import Progress

    from longwave.plots import draw_sample
    from longwave.tasks.lra import Drawn
    from longwave.train.config import read_task

    drawn = read_task(task, changes or [])
    if not isinstance(drawn, Drawn):
        raise ValueError(f"the task {task} reads its examples from files, or is drawn as fast as it is read")
    rest = max(1, count // 10) if held_out is None else held_out
    counts = {"train": count, "validation": rest, "test": rest}
    with Progress(console=Console(stderr=True)) as bar:
        shown = bar.add_task(f"drawing {task}", total=sum(counts.values()))
        drawn.write(out, counts, jobs, lambda rows: bar.advance(shown, rows))
    picture, half = out / "sample.png", out / "sample.half.png"
    if not picture.exists():
        draw_sample(drawn.model_copy(update={"folder": str(out)}), half, rows=min(24, count))
        half.replace(picture)
    _note(f"{sum(counts.values()):,} examples, some in {picture}; train with task.kind={task} task.folder={out}")


@app.command(
    epilog="Examples:\n\n- `longwave tokenize books/ --out corpus --tokenizer 8192`\n\n"
    "- `longwave tokenize web.jsonl wiki.parquet --out corpus --tokenizer gpt2/tokenizer.json --jobs 2`"
)
def tokenize(
    files: Annotated[list[str], typer.Argument(help="Text files, .jsonl, .parquet, folders, datasets folders.")],
    out: Annotated[Path, typer.Option(help="Folder to fill; parts of files that did not change stay.")],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="bytes, dna; a tokenizer.json, a run or folder with one, OWNER/NAME on the Hub; or how many ids are "
            "learned from the text."
        ),
    ] = "bytes",
    field: Annotated[str, typer.Option(help="Of JSON lines and tables, where the text is.")] = "text",
    jobs: Annotated[int, typer.Option(min=1, max=1024, help="Threads.")] = 1,
) -> None:
    """Turn text into tokens once, for the task `tokens`; what is learned lies beside them as tokenizer.json."""
    from rich.console import Console
    from rich.progress import Progress

    from longwave.tasks import corpus

    with Progress(console=Console(stderr=True)) as bar:
        shown = bar.add_task("tokenizing", total=None)
        chosen = int(tokenizer) if tokenizer.isdigit() else _tokenizer(tokenizer)
        corpus.tokenize(files, out, chosen, field, jobs, lambda done, of: bar.update(shown, completed=done, total=of))
    tokens = corpus.TokenFiles(out)
    _note(
        f"{len(tokens.ends):,} documents, {len(tokens):,} tokens of {tokens.vocab:,} ids, "
        f"{tokens.bytes.sum() / max(1, len(tokens)):.2f} bytes a token; "
        f"train with task.kind=tokens task.folders=[{out}]"
    )


@app.command(
    "list",
    epilog="Examples:\n\n- `longwave list`\n\n- `longwave list mamba`\n\n- `longwave list text`\n\n"
    "- `longwave list recipe`",
)
def list_(
    name: Annotated[
        str | None,
        typer.Argument(help="A mixer, filter, task, model, `recipe` or FILE.py:CLASS; default all.", callback=_allowed),
    ] = None,
) -> None:
    """List mixers, filters, tasks, models and recipes, or the options of one: types, limits, defaults, meaning."""
    from longwave.train.lookup import look_up, overview

    print(overview() if name is None else look_up(name))


@app.command(
    epilog="Examples:\n\n- `longwave show demo`\n\n- `longwave show runs/demo`\n\n"
    "- `longwave show listops --sample listops.png`\n\n- `longwave show pathfinder size=128 --sample path-x.png`"
)
def show(
    what: Annotated[
        str, typer.Argument(help="A recipe or a run; or, with --sample, a task or FILE.py:CLASS.", callback=_allowed)
    ],
    changes: Changes = None,
    sample: Annotated[
        Path | None, typer.Option(help="A file (.png, .svg, .pdf) for a picture of the task's first rows.")
    ] = None,
) -> None:
    """Show the resolved config, the parameters, and the bytes of state a layer keeps; or what a task asks, drawn."""
    from longwave.inspection import describe_growth
    from longwave.models import LM
    from longwave.models.runs import CONFIG
    from longwave.models.size import on_meta
    from longwave.plots import draw_sample
    from longwave.tasks import TASKS
    from longwave.train.config import load_recipe, read_task
    from longwave.train.loop import first_difference

    is_run = (Path(what) / CONFIG).is_file()
    if sample is not None:
        made, source = list(changes or []), Path(what) / CONFIG if is_run else what
        task = read_task(what, made) if TASKS.find(what) else load_recipe(source, made).task
        task.prepare()
        draw_sample(task, sample)
        _note(f"drawn: {sample}")
        return
    recipe = load_recipe(Path(what) / CONFIG if is_run else what, list(changes or []), dry=True)
    if is_run and (of_run := load_recipe(Path(what) / CONFIG).model) != recipe.model:
        change = first_difference("model", of_run.model_dump(), recipe.model.model_dump())
        raise ValueError(f"{what} holds another model: {change}; name a recipe to show a model that is none of a run")
    model = on_meta(recipe.model)
    print(recipe.to_yaml())
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    if not isinstance(model, LM):
        return
    print(f"\n{describe_growth(model.backbone.mixers)}")


@app.command(
    epilog="Examples:\n\n- `longwave inspect s4d d_state=16 init=inv`\n\n- `longwave inspect hyena --out hyena.svg`\n\n"
    "- `longwave inspect runs/demo --out pictures/`"
)
def inspect(
    what: Annotated[
        str,
        typer.Argument(
            help="A mixer (longwave list, or FILE.py:CLASS), a run, a checkpoint or a saved model.", callback=_allowed
        ),
    ],
    changes: Annotated[
        list[str] | None, typer.Argument(help="Options of the mixer and d_model, key=value.", callback=_allowed)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A file (.png, .svg, .pdf) for one figure of everything, or a folder for one figure a layer."
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Steps to look at, at least.")] = 1024,
) -> None:
    """Draw the filters of a mixer at its start, or of a trained model: time, frequency, eigenvalues, memory."""
    from longwave import inspection, plots
    from longwave.mixers import MIXERS
    from longwave.models.runs import is_checkpoint, model_at, run_of, step_of
    from longwave.train.config import fields
    from longwave.train.runs import load_run

    if out is not None and out.suffix not in ("", *plots.FORMATS) and not out.is_dir():
        raise ValueError(f"--out {out}: a figure ends in {', '.join(plots.FORMATS)}, and a folder in none of it")
    path, made = Path(what), list(changes or [])
    title = " ".join([what, *made])
    if not MIXERS.find(what) and (path.exists() or len(path.parts) > 1):
        if made:
            raise ValueError(f"{what} is drawn as it was trained: leave out {' '.join(made)}")
        modules = list(inspection.time_layers(load_run(path, [])[1]))
        out = out or run_of(path) / "inspect"
        folder = model_at(path)
        title = f"{run_of(path)}, step {step_of(folder)}" if is_checkpoint(folder) else str(path)
    else:
        options = {"d_model": 64, **fields(made)}
        modules = [inspection.drawn(what, options, options.pop("d_model"), length)]
        out = out or Path(f"{what}.png")
    layers = [inspection.inspect_layer(module, length) for module in modules]
    print(inspection.describe(layers))
    files = plots.draw(layers, out, title)
    _note("\n".join(f"drawn: {file}" for file in files) or "nothing is drawn")


@app.command(
    epilog="Examples:\n\n- `longwave bench ops`\n\n- `longwave bench ops --only causal_conv --repeats 3`\n\n"
    "- `longwave bench ops --device cuda --save`\n\n"
    "- `longwave bench models --save`\n\n- `longwave bench memory --only s4d --only attention`"
)
def bench(
    what: Annotated[str, typer.Argument(help="ops, models, memory, generate or online.")] = "ops",
    only: Annotated[list[str] | None, typer.Option(help="Names of ops, or of mixers; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved pairs a row, of which the median is taken.")] = 7,
    save: Annotated[bool, typer.Option(help="Append JSON lines to benchmarks/results and draw plots there.")] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda: ops in bfloat16 on a GPU, beside torch's.")] = "cpu",
) -> None:
    """Measure ops, models and generation beside their peers in one process, or the memory of mixers as texts grow."""
    from longwave import bench as benches

    on_device = device != "cpu"
    measured, columns = benches.measured(what, only or [], repeats, device)
    rows = []
    for row, line in benches.lines(measured, columns):
        print(line, flush=True)
        rows += [] if row is None else [row]
    if save:
        path = benches.save(f"{what}_cuda" if on_device else what, rows)
        plots = benches.plot(rows) if what == "ops" and not on_device else []
        _note(f"{len(rows)} rows appended to {path}" + "".join(f"\n{plot}" for plot in plots))


@app.command(
    epilog="Examples:\n\n- `longwave check my_task.py:MyTask`\n\n- `longwave check my_task.py:MyTask length=20`\n\n"
    "- `longwave check my_mixer.py:Foo d_state=4`\n\n- `longwave check mamba`"
)
def check(
    what: Annotated[
        str, typer.Argument(help="A task, a mixer or a filter: FILE.py:CLASS, or a name.", callback=_allowed)
    ],
    changes: Annotated[
        list[str] | None, typer.Argument(help="Its options, key=value; default its examples.", callback=_allowed)
    ] = None,
) -> None:
    """Run the contract that every task and mixer keeps on a class of yours; a filter's is that of a mixer of it."""
    from longwave.contract import checks
    from longwave.train.config import fields

    broken = 0
    for made, clause, fault in checks(what, fields(changes) if changes else None):
        broken += fault is not None
        said = f"ok      {clause}" if fault is None else f"BROKEN  {clause}\n        {fault}"
        print(f"{said}  {made or ''}".rstrip(), flush=True)
    print("the contract is kept" if not broken else f"{broken} clauses are broken")
    if broken:
        raise typer.Exit(1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    epilog="Examples:\n\n- `longwave hf transformers serve runs/mine/checkpoints/step-00001000 --port 8000`",
)
def hf(
    program: Annotated[str, typer.Argument(help="Its name, such as transformers, lm_eval or accelerate.")],
    context: typer.Context,
) -> None:
    """Run a program of Hugging Face's kind with its own arguments; longwave's models are known to it."""
    from importlib.metadata import entry_points

    from longwave.errors import nearest

    programs = {point.name: point for point in entry_points(group="console_scripts")}
    if program not in programs:
        raise ValueError(f"no program is called {program}{nearest(program, programs)}; pip install what has it")
    import longwave.hf  # noqa: F401 - that makes them known

    sys.argv = [program, *context.args]
    sys.exit(programs[program].load()())


@app.command()
def doctor() -> None:
    """Say what this machine has, and check every mixer for causality and parallel = recurrent."""
    import torch

    from longwave.inspection import self_check
    from longwave.machine import facts
    from longwave.ops import OPS

    print("\n".join(facts()))
    forced = os.environ.get("LONGWAVE_BACKEND")
    print("backends" + (f" (LONGWAVE_BACKEND={forced})" if forced else "") + ", first choice first, for float32:")
    for name, op in OPS.items():
        refusals = op.refusals("cuda" if torch.cuda.is_available() else "cpu")
        print(f"  {name:24}{', '.join(backend for backend, why in refusals.items() if why is None)}")
        for backend, reason in refusals.items():
            if reason is not None:
                print(f"  {'':24}not {backend}: {reason}")
    print("self-check in float64: largest change of the past by the future, largest difference of steps and parallel")
    sound = True
    for check in self_check():
        sound = sound and check.good
        steps = "no state" if check.gap is None else f"{check.gap:8.1e}"
        verdict = "ok" if check.good else "WRONG"
        print(f"  {check.name:16} {check.leak:8.1e} {steps}  {verdict}  {check.options or ''}")
    if not sound:
        raise typer.Exit(1)


def _tokenizer(name: str) -> "Tokenizer":
    """By its name, or of a file, a run, a model or a folder."""
    from longwave.tokenizer import FILE, PLAIN, find
    from longwave.train.runs import tokenizer_of

    found = tokenizer_of(Path(name)) if name not in PLAIN and Path(name).is_dir() else find(name)
    if found is None:
        raise ValueError(f"{name} has no {FILE}; name one that has it")
    return found


def _again() -> str:
    """The program with what allows it to read what was made here."""
    return "".join(["longwave", *(f" --trust {shlex.quote(str(file))}" for file in own.trusted())])


def _is_main() -> bool:
    """Whether this is the process, among those of lightning-fabric, torchrun or SLURM, that talks."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((rank for rank in ranks if rank is not None), "0") == "0"


def _note(text: str) -> None:
    if not _is_main():
        return
    try:
        print(text, file=sys.stderr)
    except OSError:  # the terminal is gone; nothing is left to be flushed at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _note_own_text() -> None:
    if not Path("runs/mine").exists():  # or the command would be refused, to who has done it already
        _note("on your own text: longwave train demo 'task.files=[my.txt]' --out runs/mine")


def _report(recipe: "Recipe", run: Path, metrics: dict[str, float]) -> None:
    """The end of a training: how good it is, where it lies, what to do next."""
    from longwave.models import LMSpec, SashimiSpec
    from longwave.tasks import Text

    _note("\nheld out: " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items()))
    if isinstance(recipe.task, Text) and _is_main():
        rows = {"this model": metrics["bits_per_byte"], **recipe.task.baselines()}
        _note("bits per byte of the same held-out text:")
        for name, bits in sorted(rows.items(), key=lambda row: row[1]):
            _note(f"  {name:36}{bits:.3f}")
    _note(f"run: {run}   loss plot: {run / 'loss.png'}")
    named, words = shlex.quote(str(run)), recipe.task.tokenizer
    text = words is not None and isinstance(recipe.model, LMSpec | SashimiSpec)
    prompt = "The " if words is None or words.letters is None else words.letters[:4]
    then = f'generate {named} --prompt "{prompt}" --max-new 400' if text else f"eval {named}"
    _note(f"next: {_again()} {then}")
    _note(f"to train it on: {_again()} train --resume {named} steps={2 * recipe.steps}")
    if isinstance(recipe.task, Text):
        _note_own_text()


if __name__ == "__main__":
    main()
