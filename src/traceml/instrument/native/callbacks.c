/* A function that the interpreter calls where an exception goes no further: it prints and forgets it. One that is no
 * error, such as KeyboardInterrupt of a signal's handler, is for the script: it is raised again when the callback is over. */
#include "hot_path.h"

/* Called by the main thread in the script's code. */
static int raise_again(void *exception) {
    PyErr_SetObject((PyObject *)Py_TYPE((PyObject *)exception), exception);
    Py_DECREF((PyObject *)exception);
    return -1;
}

/* Leave out the callback's own line, which is the first of the traceback; those of a signal's handler stay. */
static void forget_callback(PyObject *exception, PyObject *traceback) {
    PyObject *rest = traceback ? PyObject_GetAttrString(traceback, "tb_next") : NULL;
    if (!rest || PyException_SetTraceback(exception, rest)) PyErr_Clear();
    Py_XDECREF(rest);
}

COLD static PyObject *pass_on(unsigned long main_thread) {
    if (PyErr_ExceptionMatches(PyExc_Exception) || main_thread != this_thread()) return NULL;

    PyObject *type, *exception, *traceback;
    PyErr_Fetch(&type, &exception, &traceback);
    PyErr_NormalizeException(&type, &exception, &traceback);
    if (Py_AddPendingCall(raise_again, exception)) { /* too many are waiting */
        PyErr_Restore(type, exception, traceback);
        return NULL;
    }

    forget_callback(exception, traceback);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    return new_none();
}

static PyObject *call(PyObject *own, PyObject *const *args, Py_ssize_t n) {
    PyObject *result = PyObject_Vectorcall(PyTuple_GetItem(own, 0), args, (size_t)n, NULL);
    return result ? result : pass_on(PyLong_AsUnsignedLong(PyTuple_GetItem(own, 1)));
}

/* passing_on((function, id of the main thread)) -> the function, which passes on what is no error. */
PyObject *passing_on(PyObject *module, PyObject *own) {
    static PyMethodDef method = {"passing_on", (PyCFunction)(void (*)(void))call, METH_FASTCALL, NULL};
    (void)module;
    if (!PyTuple_Check(own) || PyTuple_Size(own) != 2 || !PyLong_Check(PyTuple_GetItem(own, 1)))
        return PyErr_Format(PyExc_TypeError, "not a function and a thread's number: %R", own);

    return PyCFunction_NewEx(&method, own, NULL);
}
