/* What hooks do outside of their usual paths. */
#include "hook.h"

PyObject *call_slow(Hook *hook, PyObject *const *args, size_t nargsf, PyObject *names) {
    return PyObject_Vectorcall(hook->slow, args, nargsf, names);
}

void note_failure(HotFields *hot, int phase) {
    if (PyErr_ExceptionMatches(PyExc_StopIteration)) return; /* of each epoch; its id is soon another object's */

    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    hot->failure = (long long)(intptr_t)error;
    hot->failed_in = phase;
    PyErr_Restore(type, error, traceback);
}

int end_watched(HotFields *hot, PyObject *result, int phase, long long *bucket, long long start, long long *spent) {
    PyObject *type = NULL, *error = NULL, *traceback = NULL;
    if (!result) PyErr_Fetch(&type, &error, &traceback);
    int status = book(hot, phase, bucket, start, spent) ? fail_open(hot) : 1;
    if (!result && status >= 0) PyErr_Restore(type, error, traceback);
    return status;
}
