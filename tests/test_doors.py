"""What both doors share. Their exit codes and errors are tested with the doors themselves."""

import subprocess
import sys

WARNING = """
import warnings
from mfllm_ref import doors, errors
def main():
    warnings.warn("a notice", errors.Notice)
    warnings.warn("of a library")
doors.run_door("simulate.py", main)
warnings.warn("after the door", errors.Notice)
"""


def test_a_notice_is_one_line_and_other_warnings_say_where_they_come_from():
    said = subprocess.run([sys.executable, "-c", WARNING], capture_output=True, text=True, check=True).stderr.splitlines()
    assert said[0] == "simulate.py: a notice"
    assert said[1] == "<string>:6: UserWarning: of a library" and said[2].endswith(": Notice: after the door")
