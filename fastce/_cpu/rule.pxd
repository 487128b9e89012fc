"""How the compiled code tells Python which rule an argument breaks.

Design
------
1. A rule has a name, which `_messages` has a text for. What breaks it raises `RuleError`, with the rule and the
   argument.
2. What only Python can read (a list, a number of another type, a dtype that no kernel reads) breaks a rule, too. Python
   converts it and calls again.
"""


cdef extern from "host/rules.h":
    int break_rule "fastce_break"(object rule, object name, double value, object other) except -1


cdef inline int fail(str rule, str name, double value=0, str other=None) except -1:
    """Raise the error for a rule: with where or by which number it is broken, or which argument a result overlaps."""
    return break_rule(rule, name, value, other)
