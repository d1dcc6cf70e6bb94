"""Which names are models', as far as can be told without torch: ours by their form, the libraries' by their sources.

torchvision and timm take seconds to import. Their sources are text: a name that stands nowhere in them is no model's.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from ijckd_fast.errors import UserError, did_you_mean
from ijckd_fast.nets import cifar_names

LIBRARIES = ("torchvision", "timm")  # in the order in which a name is looked up
MOBILENETS = ("mobilenet_v1", "mobilenetv1")
_REGISTERED = re.compile(r"^@register_model\b.*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)


def is_ours(name: str) -> bool:
    """Whether a net of this name is one of ours. UserError for one of ours in a width that it does not have."""
    library, _, short = name.rpartition("/")
    if name in MOBILENETS:
        return True
    if library == "cifar" or (library == "" and short not in cifar_names.SHARED_NAMES):
        return cifar_names.is_name(short)
    return False


def refuse_unknown(name: str) -> None:
    """UserError for a name that is certainly no model's: none of ours, and nowhere in the sources of a library.

    A library that is imported already may have nets that were registered by others: it has to be asked itself.
    """
    library, _, short = name.rpartition("/")
    if is_ours(name):
        return
    named = [each for each in LIBRARIES if library in ("", each)]
    if any(each in sys.modules for each in named):
        return
    sources = {each: _sources(each) for each in named}
    if not all(sources.values()) and named:
        return  # one is not installed, or not as text: what is said of it is said where it is imported
    word = re.compile(rf"\b{re.escape(short.partition('.')[0])}\b")
    if any(word.search(text) for texts in sources.values() for text in texts):
        return
    raise unknown(name, (known for texts in sources.values() for text in texts for known in _REGISTERED.findall(text)))


def _sources(library: str) -> list[str]:
    """The files of a library's models."""
    found = importlib.util.find_spec(library)
    folders = [] if found is None else found.submodule_search_locations or []
    paths = (path for folder in folders for path in sorted(Path(folder, "models").rglob("*.py")))
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def unknown(name: str, in_libraries: Iterable[str]) -> UserError:
    """The sentence for a name that is no model's, with the nearest that are; in_libraries: torchvision's and timm's."""
    if Path(name).is_file():
        return UserError(f"{name!r} is a file, expected a model's name: give the file as the model's checkpoint")
    library, _, short = name.rpartition("/")
    ours = [f"cifar/{known}" if known in cifar_names.SHARED_NAMES else known for known in cifar_names.NAMES]
    if library == "" and short.lower() in cifar_names.TOOLBOX_NAMES:
        meant = cifar_names.TOOLBOX_NAMES[short.lower()]
        return UserError(
            f"unknown model {name!r}: the published CIFAR net of this name is"
            f" {f'cifar/{meant}' if meant in cifar_names.SHARED_NAMES else meant!r} here"
        )
    if library == "cifar":
        return UserError(
            f"unknown model {name!r}: expected 'cifar/' and a net for small images, such as resnet8x4, wrn_40_2 or"
            f" vgg13{did_you_mean(short, cifar_names.NAMES)}"
        )
    if library not in ("", *LIBRARIES):
        return UserError(
            f"unknown model {name!r}: there is no such folder of a run and no such file, and a model's name begins"
            " with cifar/, torchvision/ or timm/, or has no slash"
        )
    known = {*ours, *MOBILENETS[:1], *in_libraries}
    return UserError(
        f"unknown model {name!r}: expected one of ours (resnet20, resnet8x4, mobilenet_v1, ...), of torchvision's or of"
        f" timm's{did_you_mean(short, known)}"
    )


def no_weights(path: str | Path) -> UserError:
    """The sentence for a file with weights that is not there."""
    return UserError(f"checkpoint {str(path)!r} does not exist: give the path of a weights file")
