/* What the hot path runs when a step is not a usual one: replaced clocks and words, errors, other threads. */
#include "hot_path.h"

PyTypeObject *hot_fields_type; /* made in hot_fields.c */
PyObject *time_source;

PyObject *use_time(PyObject *module, PyObject *source) {
    (void)module;
    assign(&time_source, source == Py_None ? NULL : source);
    return new_none();
}

int read_source(long long *now) {
    PyObject *number = PyObject_CallNoArgs(time_source);
    *now = number ? PyLong_AsLongLong(number) : -1;
    Py_XDECREF(number);
    return *now == -1 && PyErr_Occurred() ? -1 : 0;
}

int set_item(HotFields *hot, int index, long long value) {
    PyObject *key = PyLong_FromLong(index), *number = PyLong_FromLongLong(value);
    int status = key && number ? PyObject_SetItem(none_for_null(hot->open_slots), key, number) : -1;
    Py_XDECREF(key);
    Py_XDECREF(number);
    return status;
}

int call_method(HotFields *hot, const char *name, long long number, PyObject *object) {
    PyObject *result = object ? PyObject_CallMethod((PyObject *)hot, name, "LO", number, object)
                              : PyObject_CallMethod((PyObject *)hot, name, "L", number);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

int fail_open(HotFields *hot) {
    if (!PyErr_ExceptionMatches(PyExc_Exception)) return -1;

    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (traceback) PyException_SetTraceback(error, traceback);

    PyObject *result = PyObject_CallMethod((PyObject *)hot, "fail", "O", error);
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* A thread to which the training moved with its context counts too: see `on_training_thread`. */
int is_in_context(HotFields *hot) {
    if (!hot->thread || !hot->in_context) return 0;

    PyObject *token = PyObject_CallNoArgs(hot->in_context);
    int is_true = token ? PyObject_IsTrue(token) : -1;
    Py_XDECREF(token);
    if (is_true < 0) PyErr_Clear();
    return is_true > 0;
}

int map_ring(RingMemory *memory, PyObject *slots, int words, PyObject *buffer, long long offset, long long mask,
             int columns, PyObject *count, long long slot) {
    const long long word = (long long)sizeof(long long), row = columns * word;
    if (PyObject_GetBuffer(slots, &memory->words, PyBUF_WRITABLE)
        || PyObject_GetBuffer(buffer, &memory->rows, PyBUF_WRITABLE)
        || PyObject_GetBuffer(count, &memory->counts, PyBUF_WRITABLE))
        return -1;

    if (memory->words.len >= words * word && slot >= 0 && slot < memory->counts.len / word && offset >= 0
        && offset % word == 0 && offset <= memory->rows.len && mask >= 0 && mask < (memory->rows.len - offset) / row)
        return 0;

    PyErr_SetString(PyExc_ValueError, "the ring does not fit into its memory");
    return -1;
}

void unmap_ring(RingMemory *memory) {
    PyBuffer_Release(&memory->words); /* does nothing where it holds none */
    PyBuffer_Release(&memory->rows);
    PyBuffer_Release(&memory->counts);
}
