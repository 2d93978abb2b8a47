# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, auto_pickle=False, embedsignature=True, binding=True
"""Objects that last as long as their process, and are never written to for being used.

Whoever uses an object counts a reference in it, and so writes to its page. After a fork that page
is copied: what forks of a process share shrinks to half in their first second. Python 3.12 and
later have objects whose count is never written (PEP 683), None for one; here, all that there are
become such. Before 3.12 nothing happens, and without the interpreter's lock neither, as threads
count there in another way.
"""

import gc
from types import CodeType

cdef extern from *:
    """
    #if PY_VERSION_HEX >= 0x030C0000 && !defined(Py_GIL_DISABLED)
    #define XVD_IMMORTAL 1
    #else
    #define XVD_IMMORTAL 0
    #endif
    #define xvd_references(o) Py_REFCNT(o)
    #define xvd_set_references(o, n) Py_SET_REFCNT(o, n)
    """
    int XVD_IMMORTAL
    Py_ssize_t xvd_references(object)
    void xvd_set_references(object, Py_ssize_t)


def make_immortal():
    """Let all objects that there are last until the process ends. How many became so: 0 before
    Python 3.12.

    To be called by a process that forks others, when it has made what they share. What is replaced
    later is not freed then.
    """
    cdef Py_ssize_t for_ever = xvd_references(None)
    cdef Py_ssize_t made = 0
    if not XVD_IMMORTAL:
        return 0
    gc.collect()
    # Of what no collection looks at, as strings and code, all has an owner that one does look at.
    todo = gc.get_objects()
    while todo:
        one = todo.pop()
        if xvd_references(one) >= for_ever:
            continue
        xvd_set_references(one, for_ever)
        made += 1
        todo.extend(parts_of_code(one) if type(one) is CodeType else gc.get_referents(one))
    return made


cdef tuple parts_of_code(code):
    return (code.co_consts, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars,
            code.co_filename, code.co_name, code.co_qualname, code.co_linetable,
            code.co_exceptiontable)
