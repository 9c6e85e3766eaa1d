"""``attnreg audit``: what window the layers of a model really have, by :mod:`attnreg.testing.audit`."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from torch import nn

from attnreg.cli.shared import (
    JsonOption,
    bad_value_of,
    complete_dtype,
    fail,
    integer,
    parse_dtype,
    parse_integers,
    print_json,
    print_table,
    reason_of,
    say,
)
from attnreg.printable import told
from attnreg.window import Window

# What measures is imported where it is asked for: the other commands do without.
if TYPE_CHECKING:
    from attnreg.testing.audit import Audit


def audit(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODULE:NAME]",
            help="A model, a function without arguments that makes one, or an attention, a function of query, key and value.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Instead: a small random model of a config.json of Hugging Face's transformers. Nothing is downloaded.",
        ),
    ] = None,
    as_it_is: Annotated[
        bool, typer.Option("--as-it-is", help="With --config: a model as large as the file says, with its windows.")
    ] = False,
    attn_implementation: Annotated[
        str | None, typer.Option("--attn-implementation", metavar="NAME", help="With --config: of the attention.")
    ] = None,
    causal: Annotated[
        int | None, typer.Option("--causal", parser=integer(1), metavar="W", help="Claimed: W keys, the own last.")
    ] = None,
    centered: Annotated[
        int | None, typer.Option("--centered", parser=integer(1), metavar="W", help="Claimed: W keys around the own.")
    ] = None,
    window: Annotated[
        str | None, typer.Option("--window", metavar="LEFT,RIGHT", help="Claimed: so many keys on each side.")
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", metavar="PATTERN", help="Only layers with such names, as layers.*.attn; repeatable."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout",
            metavar="LETTERS",
            help="Of query, key and value, as NHLE or NLHE, for a module that takes these.",
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", parser=integer(2), metavar="L", help="Only sequences of this length.")
    ] = None,
    documents: Annotated[
        str | None,
        typer.Option(
            "--documents", metavar="L,L,...", help="Lengths of documents packed in one sequence: they must not mix."
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="In this dtype, too; repeatable. Default: bfloat16.",
            autocompletion=complete_dtype,
        ),
    ] = None,
    train: Annotated[bool, typer.Option("--train/--no-train", help="In training mode, too.")] = True,
    cache: Annotated[
        bool | None, typer.Option("--cache/--no-cache", help="With a cache, too. Default: where the model takes one.")
    ] = None,
    compile: Annotated[
        str | None,
        typer.Option("--compile", metavar="BACKEND", help="Under torch.compile with this backend, as inductor, too."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure the window that the layers of a model really have.

    A key just inside and just outside of what a layer claims is changed, forward and in the gradient. The claim is given, or read
    from the layers and their configuration. The exit code is 0 where every claim holds, 1 where one does not or none is made.
    """
    from attnreg.testing.audit import audit_window

    if (target is None) == (config is None):
        raise typer.BadParameter("give one of MODULE:NAME and --config")
    if sum(given is not None for given in (causal, centered, window)) > 1:
        raise typer.BadParameter("give only one of --causal, --centered and --window")
    claim = _claim(causal, centered, window)
    attention = _of_config(config, as_it_is, attn_implementation) if config is not None else _named(str(target))
    lengths = None
    if documents is not None:
        lengths = parse_integers(documents, "--documents", ("L",) * (documents.count(",") + 1))
    with bad_value_of(None):
        found = audit_window(
            attention,
            window=claim,
            layers=layer,
            layout=layout,
            length=length,
            documents=lengths,
            dtypes=None if dtype is None else [parse_dtype(each) for each in dtype],
            train=train,
            cache=cache,
            compile=compile or False,
        )
    if json:
        print_json(_to_json(found))
    else:
        _show(found)
    if not found.ok:
        raise typer.Exit(1)


def _show(found: Audit) -> None:
    from attnreg.testing.audit import row_of, verdict

    print_table(("layer", "claimed", "forward", "backward", "verdict"), [row_of(layer) for layer in found.layers])
    told_each = [*found.faults, *found.gaps]
    say("\n".join(["", *told_each, *([""] if told_each else []), *verdict(found)]))


def _to_json(found: Audit) -> dict[str, Any]:
    from attnreg.testing.audit import row_of

    rows = ((layer, row_of(layer)) for layer in found.layers)
    return {
        "ok": found.ok,
        "layers": [
            {
                "name": row[0],
                "claimed": row[1],
                "forward": row[2],
                "backward": row[3],
                "faults": layer.faults,
                "gaps": layer.gaps,
            }
            for layer, row in rows
        ],
        "whole": found.whole,
        "ways": found.ways,
        "notes": found.notes,
        "called_with": found.called_with,
    }


def _claim(causal: int | None, centered: int | None, window: str | None) -> Window | None:
    if window is not None:
        with bad_value_of("--window"):
            return Window(*parse_integers(window, "--window", ("LEFT", "RIGHT")))
    if centered is not None:
        return Window.centered(centered)
    return None if causal is None else Window.causal(causal)


def _of_config(path: Path, as_it_is: bool, implementation: str | None) -> nn.Module:
    from attnreg.testing.audit_config import model_of_config

    try:
        model, smaller = model_of_config(path, as_it_is=as_it_is, implementation=implementation)
    except ImportError as error:
        fail(f"--config needs transformers: {error}")
    except OSError as error:
        raise typer.BadParameter(reason_of(error), param_hint="--config") from None
    # Of whatever kind: a configuration is a stranger's, and what reads it, too.
    except Exception as error:
        fail(f"no model can be made of {path}: {told(error)}")
    if smaller:
        say(f"a small model: {'; '.join(smaller)}", err=True)
    return model


def _named(target: str) -> Any:
    """What MODULE:NAME is, made if it is a function without arguments."""
    module, colon, name = target.partition(":")
    if not colon or not module or not name:
        raise typer.BadParameter(f"expected MODULE:NAME, got {target!r}", param_hint="MODULE:NAME")
    # As with ``python -m``, what lies here can be imported.
    sys.path.insert(0, "")
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        if not isinstance(found, nn.Module) and callable(found) and _takes_nothing(found):
            found = found()
    except Exception as error:
        raise typer.BadParameter(f"{target}: {told(error)}", param_hint="MODULE:NAME") from None
    finally:
        sys.path.remove("")
    if not callable(found):
        raise typer.BadParameter(
            f"{target} is no model and no function, it is {type(found).__name__}", param_hint="MODULE:NAME"
        )
    return found


def _takes_nothing(function: Any) -> bool:
    required = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    parameters = inspect.signature(function).parameters.values()
    return not any(each.kind in required and each.default is each.empty for each in parameters)
