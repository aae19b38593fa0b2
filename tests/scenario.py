"""A function of a test module in a process of its own: for what would crash this one, forks it or limits it.

    python scenario.py MODULE FUNCTION BASE ENGINE DEBUG SQPOLL [ARGUMENT ...]

The function gets make_loop(patched=True, **options) and the arguments, as text; see helpers.in_child().
"""

import faulthandler
import functools
import importlib
import sys

import helpers


def main(module, function, base, engine, debug, sqpoll, *arguments):
    faulthandler.enable()
    case = helpers.Case(base, engine, debug == "True", sqpoll == "True")
    getattr(importlib.import_module(module), function)(functools.partial(helpers.new_loop, case), *arguments)


main(*sys.argv[1:])
