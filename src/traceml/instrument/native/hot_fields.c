/* Fields of the open step, and the usual end of a step. */
#include "hot_path.h"

#include <stddef.h>

/* ---- the end of a step ---- */

/* Values go straight to the row: a copy of an array waits for all stores before it, also those that missed the cache. */
static inline void write_row(HotFields *hot, long long t, long long user_ns, long long bits) {
    long long *restrict row = hot->first_row + (hot->rows & hot->mask) * STEPS_COLUMNS;
    for (int column = 0; column < STEPS_COLUMNS; column++) row[column] = 0; /* the compiler leaves out what follows */
    row[STEPS_STEP] = hot->rows + hot->before;
    row[STEPS_T_END_NS] = t;
    row[STEPS_TOTAL_NS] = t - hot->part_start;
    row[STEPS_INPUT_WAIT_NS] = hot->input_ns;
    row[STEPS_FORWARD_NS] = hot->forward_ns;
    row[STEPS_BACKWARD_NS] = hot->backward_ns;
    row[STEPS_OPTIMIZER_NS] = hot->optimizer_ns;
    row[STEPS_USER_NS] = user_ns;
    row[STEPS_BACKWARD_OWN_NS] = -1;
    row[STEPS_ELEMENTS] = hot->elements;
    row[STEPS_SAMPLES] = hot->samples;
    row[STEPS_BITS] = bits;
    hot->rows++;
    __atomic_store_n(hot->count, hot->rows, __ATOMIC_RELEASE); /* the row first, the counter afterwards */
}

COLD static int maintain(HotFields *hot) {
    PyObject *listener = PyObject_GetAttrString((PyObject *)hot, "listener");
    PyObject *result = listener ? PyObject_CallMethod(listener, "maintain", "LL", hot->forward_ns, hot->backwards) : NULL;
    Py_XDECREF(listener);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

static int append_user_phases(HotFields *hot, long long *total) {
    PyObject *number = PyObject_CallMethod((PyObject *)hot, "append_user_phases", NULL);
    *total = number ? PyLong_AsLongLong(number) : -1;
    Py_XDECREF(number);
    return *total == -1 && PyErr_Occurred() ? -1 : 0;
}

/* Read the number of collectives that the process group has issued, as it is in the bits of a row. */
static int read_sequence(HotFields *hot, long long *bits) {
    PyObject *number = PyObject_CallNoArgs(hot->sequence);
    long long issued = number ? PyLong_AsLongLong(number) : -1;
    Py_XDECREF(number);
    if (issued == -1 && PyErr_Occurred()) return -1;

    *bits = (long long)((unsigned long long)issued * (unsigned long long)hot->sequence_unit) & hot->sequence_mask;
    return 0;
}

int commit_step(HotFields *hot, long long t) {
    int is_whole = !hot->needs_slow_commit && hot->rows < hot->slow_row && !hot->open_users && hot->count;
    if (!LIKELY(is_whole && !(hot->batches > 0 && hot->backwards > hot->batches)))
        return call_method(hot, "commit_slow", t, NULL);

    long long n = hot->rows, user_ns = 0, bits, issued = 0;
    /* First: it is a function in Python, in which Ctrl-C may be raised. */
    if (!LIKELY(none_for_null(hot->sequence) == Py_None) && read_sequence(hot, &issued)) return -1;

    if (!LIKELY(!hot->has_user_phases) && append_user_phases(hot, &user_ns)) return -1;

    if (none_for_null(hot->first_loader) == Py_None) {
        bits = (hot->backwards & hot->micro_mask) | hot->no_loader_bits;
    } else {
        bits = (hot->backwards < hot->batches ? hot->backwards : hot->batches) & hot->micro_mask;
        assign(&hot->batch, NULL);
        assign(&hot->first_loader, NULL);
        hot->batches = 0;
    }

    write_row(hot, t, user_ns, bits | issued);
    hot->part_start = t;
    if (set_word(hot, SLOT_STEP_START, t) || set_word(hot, SLOT_STEP, hot->rows + hot->before)) return -1;

    assign(&hot->closing_trigger, hot->not_ready);
    hot->step_call = hot->failure = 0;
    if (!LIKELY(n & hot->maintenance_mask) && maintain(hot)) return -1;

    hot->input_ns = hot->forward_ns = hot->backward_ns = hot->optimizer_ns = 0;
    hot->backwards = hot->samples = hot->elements = hot->has_user_phases = 0;
    return 0;
}

static PyObject *method_commit(PyObject *self, PyObject *time) {
    long long t = PyLong_AsLongLong(time);
    if ((t == -1 && PyErr_Occurred()) || commit_step((HotFields *)self, t)) return NULL;

    return new_none();
}

/* ---- the type ---- */

static void disconnect(HotFields *hot) {
    hot->words = hot->count = NULL;
    Py_CLEAR(hot->mapped_slots);
    unmap_ring(&hot->memory);
}

static PyObject *method_connect(PyObject *self, PyObject *args) {
    HotFields *hot = (HotFields *)self;
    PyObject *slots, *buffer, *count, *not_ready, *on_forward, *check_forward, *in_context;
    long long offset, slot;
    if (!PyArg_ParseTuple(args, "O(OLLOL)(LLLLL)(OOO)O:connect", &slots, &buffer, &offset, &hot->mask, &count, &slot,
                          &hot->micro_mask, &hot->no_loader_bits, &hot->maintenance_mask, &hot->sequence_unit,
                          &hot->sequence_mask, &not_ready, &on_forward, &check_forward, &in_context))
        return NULL;

    disconnect(hot);
    if (map_ring(&hot->memory, slots, SLOT_STEP + 1, buffer, offset, hot->mask, STEPS_COLUMNS, count, slot)) return NULL;

    assign(&hot->mapped_slots, slots);
    assign(&hot->open_slots, slots);
    assign(&hot->not_ready, not_ready);
    assign(&hot->on_forward, on_forward);
    assign(&hot->check_forward, check_forward);
    assign(&hot->in_context, in_context);
    hot->first_row = (long long *)((char *)hot->memory.rows.buf + offset);
    hot->words = hot->memory.words.buf;
    hot->count = (long long *)hot->memory.counts.buf + slot;
    return new_none();
}

#define EACH_OBJECT(DO) \
    DO(open_slots) DO(closing_trigger) DO(batch) DO(first_loader) DO(usual_trigger) DO(usual_loader) DO(input_shape) \
    DO(rare_times) DO(sequence) DO(mapped_slots) DO(not_ready) DO(on_forward) DO(check_forward) DO(in_context)

static int hot_traverse(PyObject *self, visitproc visit, void *arg) {
    HotFields *hot = (HotFields *)self;
    Py_VISIT(Py_TYPE(self));
#define VISIT(name) Py_VISIT(hot->name);
    EACH_OBJECT(VISIT)
#undef VISIT
    for (Py_ssize_t i = 0; i < hot->open_users; i++) Py_VISIT(hot->open_user_phases[i].phase);
    return 0;
}

static int hot_clear(PyObject *self) {
    HotFields *hot = (HotFields *)self;
#define CLEAR(name) Py_CLEAR(hot->name);
    EACH_OBJECT(CLEAR)
#undef CLEAR
    while (hot->open_users > 0) {
        OpenUserPhase *open = hot->open_user_phases + --hot->open_users; /* Py_CLEAR evaluates its argument twice */
        Py_CLEAR(open->phase);
    }

    return 0;
}

static void hot_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    disconnect((HotFields *)self);
    hot_clear(self);
    PyMem_Free(((HotFields *)self)->open_user_phases);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

#define NUMBER(name) {#name, T_LONGLONG, offsetof(HotFields, name), 0, NULL}
#define TRUTH(name) {#name, T_BOOL, offsetof(HotFields, name), 0, NULL}
#define OBJECT(name) {#name, T_OBJECT, offsetof(HotFields, name), 0, NULL}

static PyMemberDef members[] = {
    {"thread", T_ULONG, offsetof(HotFields, thread), 0, NULL},
    NUMBER(current), NUMBER(input_ns), NUMBER(forward_ns), NUMBER(backward_ns), NUMBER(optimizer_ns), NUMBER(rows),
    NUMBER(before), NUMBER(part_start), NUMBER(step_call), NUMBER(backwards), NUMBER(batches), NUMBER(last_optimizer),
    NUMBER(slow_row), NUMBER(failure), NUMBER(failed_in),
    NUMBER(loss_mask), NUMBER(input_samples), NUMBER(input_elements), NUMBER(samples), NUMBER(elements),
    TRUTH(needs_slow_commit), TRUTH(has_user_phases), TRUTH(needs_slow_backward), TRUTH(inspects),
    OBJECT(closing_trigger), OBJECT(batch), OBJECT(first_loader), OBJECT(usual_trigger), OBJECT(usual_loader),
    OBJECT(input_shape), OBJECT(rare_times), OBJECT(sequence),
    {NULL, 0, 0, 0, NULL},
};

static PyObject *get_open_slots(PyObject *self, void *unused) {
    (void)unused;
    PyObject *slots = none_for_null(((HotFields *)self)->open_slots);
    Py_INCREF(slots);
    return slots;
}

static int set_open_slots(PyObject *self, PyObject *slots, void *unused) {
    (void)unused;
    HotFields *hot = (HotFields *)self;
    assign(&hot->open_slots, slots);
    hot->words = slots && slots == hot->mapped_slots ? hot->memory.words.buf : NULL;
    return 0;
}

static PyGetSetDef computed[] = {
    {"open_slots", get_open_slots, set_open_slots, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef methods[] = {
    {"connect", method_connect, METH_VARARGS, NULL},
    {"commit", method_commit, METH_O, NULL},
    {"enter", method_enter, METH_O, NULL},
    {"leave", (PyCFunction)(void (*)(void))method_leave, METH_FASTCALL, NULL},
    {"cancel", (PyCFunction)(void (*)(void))method_cancel, METH_FASTCALL, NULL},
    {"account_user_phases", method_account_user_phases, METH_O, NULL},
    {"end_user_phases", method_end_user_phases, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

PyTypeObject *make_hot_fields_type(void) {
    static PyType_Slot slots[] = {
        {Py_tp_traverse, hot_traverse}, {Py_tp_clear, hot_clear}, {Py_tp_dealloc, hot_dealloc},
        {Py_tp_members, members}, {Py_tp_getset, computed}, {Py_tp_methods, methods}, {0, NULL},
    };
    static PyType_Spec spec = {"traceml.instrument.native._hot_path.HotFields", sizeof(HotFields), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, slots};
    hot_fields_type = (PyTypeObject *)PyType_FromSpec(&spec);
    return hot_fields_type;
}
