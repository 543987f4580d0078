/* The hot path of the step clock: fields of the open step, and hooks around the calls of a training loop.
 *
 * Limited API of Python 3.11: one library serves 3.11 and all later versions. Vectorcall is part of it from 3.12 on,
 * but 3.11 exports the same symbols, so they are declared here. */
#ifndef TRACEML_HOT_PATH_H
#define TRACEML_HOT_PATH_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>
#include <string.h>

#define VECTORCALL_FLAG (1UL << 11)
#define METHOD_DESCRIPTOR_FLAG (1UL << 17)
#define ARGUMENTS_OFFSET ((size_t)1 << (8 * sizeof(size_t) - 1))

PyAPI_FUNC(PyObject *) PyObject_Vectorcall(PyObject *, PyObject *const *, size_t, PyObject *);
PyAPI_FUNC(PyObject *) PyVectorcall_Call(PyObject *, PyObject *, PyObject *);

/* Numbers of phases and of words in the flight file; `LAYOUT` tells them to Python, which compares. */
enum { INPUT_WAIT = 0, FORWARD = 2, BACKWARD = 3, OPTIMIZER = 4, OTHER = 8, STEP_START = 16, STEP = 17, COLUMNS = 15 };

typedef struct {
    PyObject_HEAD
    unsigned long thread;
    long long current;
    long long input_ns, forward_ns, backward_ns, optimizer_ns;
    long long rows, before, seg_start, attempt, backwards, batches, last_optimizer, loss_mask;
    long long failure, failed_in; /* id of the exception that left a hook last, and the phase */
    long long input_samples, input_elements, samples, elements;
    char dirty, detail, inspects;
    PyObject *open_slots, *closes_at, *batch, *first_loader, *usual, *usual_loader, *input_shape, *rare_times;
    /* From `connect`: the memory of the flight file, and objects of the clock's rules. */
    PyObject *mapped_slots, *not_ready, *on_forward, *check_forward, *in_context;
    Py_buffer slots_buffer, ring_buffer, count_buffer;
    long long *words, *count;
    char *first_row;
    long long mask, micro_mask, no_loader_bits, upkeep_mask;
} HotFields;

extern PyTypeObject *hot_fields_type;

PyTypeObject *make_hot_fields_type(void);
PyTypeObject *make_hook_type(void);
PyObject *use_time(PyObject *module, PyObject *source);

/* All return 0, or -1 with an exception set. */
int read_clock(long long *now);
int set_word(HotFields *hot, int index, long long value);
int commit_step(HotFields *hot, long long t);
int call_method(HotFields *hot, const char *name, long long number, PyObject *object);

/* After an exception in our code: pass it to the clock's `fail`, which switches the hooks off. Returns 0; -1 where it
 * is none of ours, such as KeyboardInterrupt, and stays set. */
int fail_open(HotFields *hot);
int is_training_thread(HotFields *hot);
int is_plain(const HotFields *hot);

static inline PyObject *none_for_null(PyObject *object) { return object ? object : Py_None; }

/* Not Py_RETURN_NONE: with the headers of 3.12 and later it takes None for immortal, which it is not in 3.11. */
static inline PyObject *new_none(void) {
    Py_INCREF(Py_None);
    return Py_None;
}

static inline void assign(PyObject **field, PyObject *value) {
    PyObject *old = *field;
    Py_XINCREF(value);
    *field = value;
    Py_XDECREF(old);
}

#endif
