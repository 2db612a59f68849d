"""The exercises' command line.

python -m tests learn                       where am I: all exercises, and the next one
python -m tests start ch03                  makes ch03_gqa/my_gqa.py, to be filled in
python -m tests check ch03 [NAME] [--watch] what is right, and what is wrong with the rest
python -m tests hint NAME                   the next of three hints
python -m tests diff NAME [--reveal]        the answer beside the reference
python -m tests release ch03 --out dist     for instructors: hand-out and autograders
python -m tests grade FILE --chapter ch03   for instructors: marks a file, or a folder of them
"""

import argparse
import sys
from pathlib import Path

from tests.exercise import ExerciseError


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, exit code 2."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}\n")


def parser() -> Parser:
    top = Parser(prog="python -m tests", description="Exercises: learn, check, release, grade.")
    add = top.add_subparsers(dest="command", required=True, parser_class=Parser).add_parser
    add("learn", help="a table of all exercises, and the next one")

    start = add("start", help="make my_<topic>.py from the chapter's stubs")
    start.add_argument("chapter", nargs="?", help="ch01 to ch08")
    start.add_argument("--stubs", action="store_true", help="write exercises.py anew")

    check = add("check", help="check the answers in my_<topic>.py")
    check.add_argument("chapter", help="ch01 to ch08")
    check.add_argument("name", nargs="?", help="one exercise; without it, all of the chapter")
    check.add_argument("--watch", action="store_true", help="again at each change of the file")

    add("hint", help="the next of three hints").add_argument("name")
    diff = add("diff", help="the answer beside the reference, once it is right")
    diff.add_argument("name")
    diff.add_argument("--reveal", action="store_true", help="also if it is not right yet")

    release = add("release", help="for instructors: hand-out, Gradescope zip, nbgrader source")
    release.add_argument("chapter", help="ch01 to ch08")
    release.add_argument("--out", type=Path, required=True, help="a folder, made anew")
    with_variants(release)

    grade = add("grade", help="for instructors: grade a submission, or a folder of them")
    grade.add_argument("file", type=Path, help=".py or .ipynb, or a folder of submissions")
    grade.add_argument("--chapter", required=True, help="ch01 to ch08")
    grade.add_argument("--gradescope", type=Path, help="write Gradescope's results.json here")
    grade.add_argument("--json", type=Path, help="write all results here")
    grade.add_argument("--csv", type=Path, help="a folder: one line a student")
    grade.add_argument("--similarity", type=Path, help="a folder: pairs that look alike, as CSV")
    grade.add_argument("--out", type=Path, help="a folder: one result a student; goes on with it")
    grade.add_argument("--only", help="one exercise")
    grade.add_argument("--timeout", type=float, default=60.0, help="seconds an exercise (60)")
    with_variants(grade)
    return top


def with_variants(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, default=0, help="other shapes and values")
    command.add_argument("--variant", action="store_true", help="other conventions")
    command.add_argument("--overlay", type=Path, help="a folder with private checks")


def run(args: argparse.Namespace) -> int:
    # Imported late: `hint` needs no torch, and none of these needs the others.
    try:
        if args.command == "release":
            from tests.release import release

            return release(args)
        if args.command == "grade":
            from tests.grade import grade

            return grade(args)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tests."):
            raise ExerciseError(f"{args.command}: this folder holds no solutions") from None
        raise
    from tests import learn

    if args.command == "learn":
        return learn.learn()
    if args.command == "start":
        if args.stubs:
            return learn.write_stubs(args.chapter)
        if args.chapter is None:
            raise ExerciseError("start: expected a chapter, ch01 to ch08")
        return learn.start(args.chapter)
    if args.command == "check":
        return learn.check(args.chapter, args.name, args.watch)
    if args.command == "hint":
        return learn.hint(args.name)
    return learn.diff(args.name, args.reveal)


def main() -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without … or × gets a question mark
    try:
        return run(parser().parse_args())
    except ExerciseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
