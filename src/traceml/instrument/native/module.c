/* The extension module: its types, and what it was compiled for. */
#include "hot_path.h"

static PyMethodDef functions[] = {
    {"use_time", use_time, METH_O, NULL},
    {"metric_writer", metric_writer, METH_VARARGS, NULL},
    {"passing_on", passing_on, METH_O, NULL},
    {"of_types", of_types, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static int fill(PyObject *module) {
    PyObject *fields = (PyObject *)make_hot_fields_type(), *hook = fields ? (PyObject *)make_hook_type() : NULL;
    PyObject *user_phase = hook ? (PyObject *)make_user_phase_type() : NULL;
    int status = user_phase ? PyModule_AddStringConstant(module, "LAYOUT", LAYOUT) : -1;
    if (!status) status = PyModule_AddObjectRef(module, "HotFields", fields);
    if (!status) status = PyModule_AddObjectRef(module, "Hook", hook);
    if (!status) status = PyModule_AddObjectRef(module, "UserPhase", user_phase);
    Py_XDECREF(hook);
    Py_XDECREF(user_phase);
    return status; /* `hot_fields_type` keeps its reference */
}

PyMODINIT_FUNC PyInit__hot_path(void) {
    if (this_thread() != PyThread_get_thread_ident())
        return PyErr_Format(PyExc_ImportError, "the number of a thread is not where this library looks for it");

    static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_hot_path", NULL, -1, functions, NULL, NULL, NULL, NULL};
    PyObject *module = PyModule_Create(&definition);
    if (module && fill(module)) Py_CLEAR(module);
    return module;
}
