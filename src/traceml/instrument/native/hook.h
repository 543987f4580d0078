/* A hook, and what the usual paths of all hooks share. */
#ifndef TRACEML_HOOK_H
#define TRACEML_HOOK_H

#include "hot_path.h"

typedef struct {
    PyObject_HEAD
    PyObject *(*vectorcall)(PyObject *, PyObject *const *, size_t, PyObject *);
    HotFields *hot;
    PyObject *original, *slow, *helper;
    int phase;
    PyObject *module, *tensor_type, *is_grad_enabled; /* of a forward */
    lenfunc length;
    PyCFunction numel;
    _Bool (*grad_mode)(void); /* NULL where torch has no such function */
    PyObject *dict, *weakrefs;
} Hook;

#pragma GCC visibility push(hidden)
PyObject *call_forward(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *names);

/* Look up what a forward asks torch for, past the layers of a call and of an attribute by its name: 0, or -1 with an
 * exception set. `numel` is a method of a tensor, `grad_mode` the address of a function in C. */
int prepare_forward(Hook *hook, PyObject *numel, size_t grad_mode);

COLD PyObject *call_slow(Hook *hook, PyObject *const *args, size_t nargsf, PyObject *names);

/* Hooks in C have no frame in the traceback, from which the phase of an exception is read elsewhere. */
COLD void note_failure(HotFields *hot, int phase);
COLD int end_watched(HotFields *hot, PyObject *result, int phase, long long *bucket, long long start, long long *spent);
#pragma GCC visibility pop

static inline Py_ssize_t count_of(size_t nargsf) { return (Py_ssize_t)(nargsf & ~ARGUMENTS_OFFSET); }

static inline int is_usual(HotFields *hot) { return hot->current == PHASE_OTHER && is_training_thread(hot); }

static inline int begin_phase(HotFields *hot, int phase, long long t) {
    hot->current = phase;
    return set_word(hot, phase, t);
}

static inline int book(HotFields *hot, int phase, long long *bucket, long long start, long long *spent) {
    long long now;
    if (read_clock(&now)) return -1;

    *spent = now - start;
    *bucket += *spent;
    hot->current = PHASE_OTHER;
    return set_word(hot, phase, 0);
}

/* End a phase after a call with this result, whose exception stays set. Returns 1 if it was booked, 0 after an error of
 * ours, -1 with an exception that is not ours. */
static inline int end_phase(HotFields *hot, PyObject *result, int phase, long long *bucket, long long start,
                            long long *spent) {
    if (!LIKELY(result)) note_failure(hot, phase);
    if (!LIKELY(is_plain(hot))) return end_watched(hot, result, phase, bucket, start, spent);

    book(hot, phase, bucket, start, spent);
    return 1;
}

static inline PyObject *checked(PyObject *result, int status) {
    if (status >= 0) return result;

    Py_XDECREF(result);
    return NULL;
}

#endif
