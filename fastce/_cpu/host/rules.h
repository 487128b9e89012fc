/* How a broken rule is told: by a function that compilers take for unlikely, so that what leads there stays out of the
   way of calls that break none. */
#ifndef FASTCE_RULES_H
#define FASTCE_RULES_H

#include <Python.h>

#include "simd/compiler.h"

/* Raises RuleError; returns -1. */
FASTCE_COLD int fastce_break(PyObject* rule, PyObject* name, double value, PyObject* other) {
    PyObject* module = PyImport_ImportModule("fastce._cpu._rules");
    PyObject* error = module == NULL ? NULL : PyObject_GetAttrString(module, "RuleError");
    PyObject* arguments = error == NULL ? NULL : Py_BuildValue("OOdO", rule, name, value, other);
    if (arguments != NULL) PyErr_SetObject(error, arguments);
    Py_XDECREF(arguments);
    Py_XDECREF(error);
    Py_XDECREF(module);
    return -1;
}

#endif
