/* The usual logged value: a number under a known name, while memory has room for its row. */
#include "hot_path.h"

static const char kind_of_writer[] = "traceml.instrument.native.metrics";

typedef struct {
    PyObject *entries; /* name -> [its id, ...] */
    PyObject *ring, *acquire, *release;
    long long *slots, *count, *first_row;
    long long mask, limit, experiment;
    RingMemory memory;
} MetricWriter;

static PyObject *new_truth(int truth) {
    PyObject *object = truth ? Py_True : Py_False;
    Py_INCREF(object);
    return object;
}

/* What is no usual value is left to the caller, which tells of errors. */
static PyObject *not_usual(void) {
    PyErr_Clear();
    return new_truth(0);
}

static int read_value(PyObject *number, double *value) {
    if (!PyFloat_CheckExact(number) && !PyLong_CheckExact(number)) return -1;

    *value = PyFloat_CheckExact(number) ? PyFloat_AsDouble(number) : PyLong_AsDouble(number);
    return *value == -1 && PyErr_Occurred() ? -1 : 0;
}

static int read_step(const MetricWriter *writer, PyObject *number, long long *step) {
    if (number != Py_None && !PyLong_CheckExact(number)) return -1;

    *step = number == Py_None ? writer->slots[SLOT_STEP] : PyLong_AsLongLong(number);
    return (*step == -1 && PyErr_Occurred()) || (number == Py_None && *step < 0) ? -1 : 0;
}

static int read_name(const MetricWriter *writer, PyObject *name, long long *id) {
    PyObject *entry = PyUnicode_CheckExact(name) ? PyDict_GetItemWithError(writer->entries, name) : NULL;
    if (!entry) return -1;

    *id = PyLong_AsLongLong(PyList_GetItem(entry, 0));
    return *id == -1 && PyErr_Occurred() ? -1 : 0;
}

/* The limit moves when room was made, which Python does. */
COLD static int has_new_limit(MetricWriter *writer, long long n) {
    PyObject *limit = PyObject_GetAttrString(writer->ring, "limit");
    if (limit) writer->limit = PyLong_AsLongLong(limit);
    Py_XDECREF(limit);
    return n < writer->limit && !PyErr_Occurred();
}

static int write_value(MetricWriter *writer, long long step, long long id, double value) {
    long long n = *writer->count;
    if (!LIKELY(n < writer->limit) && !has_new_limit(writer, n)) return 0;

    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    long long *row = writer->first_row + (n & writer->mask) * METRICS_COLUMNS;
    for (int column = 0; column < METRICS_COLUMNS; column++) row[column] = 0;
    row[METRICS_T_NS] = time.tv_sec * 1000000000LL + time.tv_nsec;
    row[METRICS_STEP] = step;
    row[METRICS_NAME_ID] = id;
    memcpy(row + METRICS_VALUE, &value, sizeof value);
    row[METRICS_EXPERIMENT] = writer->experiment;
    __atomic_store_n(writer->count, n + 1, __ATOMIC_RELEASE); /* the row first, the counter afterwards */
    if ((unsigned long)writer->slots[SLOT_TRAINING_THREAD] == this_thread()) writer->slots[SLOT_LOGGED]++;
    return 1;
}

/* writer(name, value, step) -> whether it has written the row. It is under the ring's lock, which is never waited for: a
 * thread that has it is in the middle of a row. */
static PyObject *write_metric(PyObject *capsule, PyObject *const *args, Py_ssize_t n) {
    MetricWriter *writer = PyCapsule_GetPointer(capsule, kind_of_writer);
    long long step, id;
    double value;
    if (n != 3 || read_name(writer, args[0], &id) || read_value(args[1], &value) || read_step(writer, args[2], &step))
        return not_usual();

    PyObject *waits = Py_False, *held = PyObject_Vectorcall(writer->acquire, &waits, 1, NULL);
    Py_XDECREF(held); /* one of two constants */
    if (held != Py_True) return not_usual();

    int is_written = write_value(writer, step, id, value);
    if (!is_written) PyErr_Clear();
    PyObject *released = PyObject_Vectorcall(writer->release, NULL, 0, NULL);
    Py_XDECREF(released);
    return released ? new_truth(is_written) : NULL;
}

/* ---- its making ---- */

static void free_writer(MetricWriter *writer) {
    unmap_ring(&writer->memory);
    Py_CLEAR(writer->entries);
    Py_CLEAR(writer->ring);
    Py_CLEAR(writer->acquire);
    Py_CLEAR(writer->release);
    PyMem_Free(writer);
}

static void free_capsule(PyObject *capsule) { free_writer(PyCapsule_GetPointer(capsule, kind_of_writer)); }

PyObject *metric_writer(PyObject *module, PyObject *args) {
    static PyMethodDef method = {"write_metric", (PyCFunction)(void (*)(void))write_metric, METH_FASTCALL, NULL};
    (void)module;
    PyObject *entries, *ring, *acquire, *release, *slots, *buffer, *count;
    long long offset, mask, slot, experiment;
    if (!PyArg_ParseTuple(args, "O!OOOO(OLLOL)L:metric_writer", &PyDict_Type, &entries, &ring, &acquire, &release,
                          &slots, &buffer, &offset, &mask, &count, &slot, &experiment))
        return NULL;

    MetricWriter *writer = PyMem_Calloc(1, sizeof *writer);
    if (!writer) return PyErr_NoMemory();

    writer->mask = mask;
    writer->experiment = experiment;
    assign(&writer->entries, entries);
    assign(&writer->ring, ring);
    assign(&writer->acquire, acquire);
    assign(&writer->release, release);
    PyObject *capsule = NULL;
    if (!map_ring(&writer->memory, slots, SLOT_LOGGED + 1, buffer, offset, mask, METRICS_COLUMNS, count, slot))
        capsule = PyCapsule_New(writer, kind_of_writer, free_capsule);
    if (!capsule) {
        free_writer(writer);
        return NULL;
    }

    writer->slots = writer->memory.words.buf;
    writer->count = (long long *)writer->memory.counts.buf + slot;
    writer->first_row = (long long *)((char *)writer->memory.rows.buf + offset);
    PyObject *function = PyCFunction_NewEx(&method, capsule, NULL);
    Py_DECREF(capsule);
    return function;
}
