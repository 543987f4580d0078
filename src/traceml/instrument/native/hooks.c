/* Hooks: callables that time a call of the training loop. Each has the usual path of its phase; in every other case it
 * calls `slow`, a Python function, with the same arguments. */
#include "hot_path.h"

#include <stddef.h>

#define MOST_ON_STACK 8

typedef struct {
    PyObject_HEAD
    PyObject *(*vectorcall)(PyObject *, PyObject *const *, size_t, PyObject *);
    HotFields *hot;
    int kind; /* the phase */
    PyObject *original, *slow, *helper, *module, *tensor_type, *is_grad_enabled;
    PyObject *dict, *weakrefs;
} Hook;

static PyObject *method_type, *shape_name, *tag_name, *trains_names;

static inline Py_ssize_t count_of(size_t nargsf) { return (Py_ssize_t)(nargsf & ~ARGUMENTS_OFFSET); }

static inline int is_unusual(HotFields *hot) { return hot->current != OTHER || !is_training_thread(hot); }

static int begin_phase(HotFields *hot, int phase, long long t) {
    hot->current = phase;
    return set_word(hot, phase, t);
}

static int book(HotFields *hot, int phase, long long *bucket, long long start, long long *spent) {
    long long now;
    if (read_clock(&now)) return -1;

    *spent = now - start;
    *bucket += *spent;
    hot->current = OTHER;
    return set_word(hot, phase, 0);
}

/* Hooks in C have no frame in the traceback, from which the phase of an exception is read elsewhere. */
static void note_failure(HotFields *hot, int phase) {
    if (PyErr_ExceptionMatches(PyExc_StopIteration)) return; /* of each epoch; its id is soon another object's */

    PyObject *kind, *error, *traceback;
    PyErr_Fetch(&kind, &error, &traceback);
    PyErr_NormalizeException(&kind, &error, &traceback);
    hot->failure = (long long)(intptr_t)error;
    hot->failed_in = phase;
    PyErr_Restore(kind, error, traceback);
}

/* End a phase after a call with this result, whose exception stays set. Returns 1 if it was booked, 0 after an error of
 * ours, -1 with an exception that is not ours. */
static int end_phase(HotFields *hot, PyObject *result, int phase, long long *bucket, long long start, long long *spent) {
    if (!result) note_failure(hot, phase);
    if (is_plain(hot)) {
        book(hot, phase, bucket, start, spent);
        return 1;
    }

    PyObject *kind = NULL, *error = NULL, *traceback = NULL;
    if (!result) PyErr_Fetch(&kind, &error, &traceback);
    int status = book(hot, phase, bucket, start, spent) ? fail_open(hot) : 1;
    if (!result && status >= 0) PyErr_Restore(kind, error, traceback);
    return status;
}

static PyObject *checked(PyObject *result, int status) {
    if (status >= 0) return result;

    Py_XDECREF(result);
    return NULL;
}

/* ---- forward ---- */

static PyObject *call_with(PyObject *function, PyObject *first, PyObject *const *args, Py_ssize_t n, PyObject *names) {
    Py_ssize_t all = n + (names ? PyTuple_Size(names) : 0);
    PyObject *on_stack[MOST_ON_STACK + 2];
    PyObject **values = all <= MOST_ON_STACK ? on_stack : PyMem_Malloc((size_t)(all + 2) * sizeof *values);
    if (!values) return PyErr_NoMemory();

    values[1] = first;
    memcpy(values + 2, args, (size_t)all * sizeof *values);
    PyObject *result = PyObject_Vectorcall(function, values + 1, (size_t)(n + 1) | ARGUMENTS_OFFSET, names);
    if (values != on_stack) PyMem_Free(values);
    return result;
}

static int measure(Hook *hook, PyObject *module, PyObject *const *args, Py_ssize_t n, PyObject *names) {
    PyObject *positional = PyTuple_New(n), *keywords = PyDict_New(), *result = NULL;
    int status = positional && keywords ? 0 : -1;
    for (Py_ssize_t i = 0; !status && i < n; i++) {
        Py_INCREF(args[i]);
        status = PyTuple_SetItem(positional, i, args[i]);
    }

    for (Py_ssize_t i = 0; !status && names && i < PyTuple_Size(names); i++)
        status = PyDict_SetItem(keywords, PyTuple_GetItem(names, i), args[n + i]);

    if (!status) result = PyObject_CallFunctionObjArgs(hook->helper, positional, keywords, module, NULL);
    Py_XDECREF(positional);
    Py_XDECREF(keywords);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* Whether the first argument has the shape of the forward before; -1 with an exception. */
static int has_known_shape(Hook *hook, PyObject *const *args, Py_ssize_t n) {
    if (!n || (PyObject *)Py_TYPE(args[0]) != hook->tensor_type) return 0;

    PyObject *shape = PyObject_GetAttr(args[0], shape_name);
    int is_equal = shape ? PyObject_RichCompareBool(shape, none_for_null(hook->hot->input_shape), Py_EQ) : -1;
    Py_XDECREF(shape);
    return is_equal;
}

static int forward_begins(Hook *hook, long long t, PyObject *trains) {
    PyObject *method = PyObject_GetAttrString((PyObject *)hook->hot, "forward_begins"), *number = PyLong_FromLongLong(t);
    PyObject *values[] = {number, hook->module, trains}, *result = NULL;
    if (method && number) result = PyObject_Vectorcall(method, values, 2, trains_names);
    Py_XDECREF(method);
    Py_XDECREF(number);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

static int begin_forward(Hook *hook, PyObject *module, PyObject *const *args, Py_ssize_t n, PyObject *names,
                         long long *t) {
    HotFields *hot = hook->hot;
    int is_known = has_known_shape(hook, args, n);
    if (is_known < 0 || (!is_known && measure(hook, module, args, n, names)) || read_clock(t)) return -1;

    PyObject *trains = PyObject_Vectorcall(hook->is_grad_enabled, NULL, 0, NULL);
    if (!trains) return -1;

    Py_DECREF(trains); /* one of two constants */
    int status = 0;
    if (trains == Py_False || hot->closes_at == hot->check_forward)
        status = forward_begins(hook, *t, trains == Py_False ? Py_False : Py_True);
    else if (hot->closes_at == hot->on_forward)
        status = commit_step(hot, *t);

    return status ? -1 : begin_phase(hot, FORWARD, *t);
}

static PyObject *call_forward(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *names) {
    Hook *hook = (Hook *)self;
    HotFields *hot = hook->hot;
    if (is_unusual(hot)) return PyObject_Vectorcall(hook->slow, args, nargsf, names);

    Py_ssize_t n = count_of(nargsf);
    PyObject *module = PyObject_Vectorcall(hook->module, NULL, 0, NULL), *result = NULL;
    long long t, spent;
    int failed = module ? begin_forward(hook, module, args, n, names, &t) : -1;
    if (!failed || !fail_open(hot)) result = call_with(hook->original, none_for_null(module), args, n, names);
    else failed = 1;

    Py_XDECREF(module);
    return failed ? result : checked(result, end_phase(hot, result, FORWARD, &hot->forward_ns, t, &spent));
}

/* ---- backward ---- */

static int begin_backward(Hook *hook, PyObject *tensors, long long *t) {
    HotFields *hot = hook->hot;
    if (!(hot->rows & hot->loss_mask)) {
        PyObject *result = PyObject_Vectorcall(hook->helper, &tensors, 1, NULL);
        Py_XDECREF(result);
        if (!result) return -1;
    }

    return read_clock(t) ? -1 : begin_phase(hot, BACKWARD, *t);
}

static PyObject *call_backward(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *names) {
    Hook *hook = (Hook *)self;
    HotFields *hot = hook->hot;
    if (hot->detail || !count_of(nargsf) || is_unusual(hot)) return PyObject_Vectorcall(hook->slow, args, nargsf, names);

    long long t, spent;
    int failed = begin_backward(hook, args[0], &t);
    if (failed && fail_open(hot)) return NULL;

    PyObject *result = PyObject_Vectorcall(hook->original, args, nargsf, names);
    if (failed) return result;

    int status = end_phase(hot, result, BACKWARD, &hot->backward_ns, t, &spent);
    if (status > 0) {
        hot->backwards++;
        hot->samples += hot->input_samples;
        hot->elements += hot->input_elements;
    }

    return checked(result, status);
}

/* ---- optimizer step ---- */

static PyObject *call_step(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *names) {
    Hook *hook = (Hook *)self;
    HotFields *hot = hook->hot;
    long long ident = count_of(nargsf) ? (long long)(intptr_t)args[0] : 0;
    if (hot->attempt || ident != hot->last_optimizer || !ident
        || none_for_null(hot->first_loader) != none_for_null(hot->usual_loader) || is_unusual(hot))
        return PyObject_Vectorcall(hook->slow, args, nargsf, names);

    long long t, spent;
    int failed = read_clock(&t) ? -1 : begin_phase(hot, OPTIMIZER, t);
    if (failed && fail_open(hot)) return NULL;

    PyObject *result = PyObject_Vectorcall(hook->original, args, nargsf, names);
    if (result) {
        hot->attempt = ident;
        assign(&hot->closes_at, hot->usual);
    }

    return failed ? result : checked(result, end_phase(hot, result, OPTIMIZER, &hot->optimizer_ns, t, &spent));
}

/* ---- next batch of a loader ---- */

static int begin_wait(HotFields *hot, PyObject *loader, long long *t) {
    if (read_clock(t)) return -1;

    int status = loader == hot->closes_at ? commit_step(hot, *t) : call_method(hot, "boundary", *t, loader);
    return status ? -1 : begin_phase(hot, INPUT_WAIT, *t);
}

static int note_batch(Hook *hook, PyObject *loader, PyObject *batch) {
    HotFields *hot = hook->hot;
    hot->batches++;
    if (none_for_null(hot->batch) == Py_None) {
        assign(&hot->batch, loader);
        if (none_for_null(hot->first_loader) == Py_None) assign(&hot->first_loader, loader);
    }

    if (!hot->inspects) return 0;

    PyObject *result = PyObject_Vectorcall(hook->helper, &batch, 1, NULL);
    Py_XDECREF(result);
    return result ? 0 : fail_open(hot);
}

/* The clock's `exhausted(loader, drain_ns)`, while the exception of the loader stays set. */
static int note_end(HotFields *hot, PyObject *loader, long long spent) {
    PyObject *kind, *error, *traceback;
    PyErr_Fetch(&kind, &error, &traceback);
    PyObject *result = PyObject_CallMethod((PyObject *)hot, "exhausted", "OL", loader, spent);
    Py_XDECREF(result);
    if (!result && fail_open(hot)) return -1;

    PyErr_Restore(kind, error, traceback);
    return 0;
}

static PyObject *call_next(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *names) {
    Hook *hook = (Hook *)self;
    HotFields *hot = hook->hot;
    if (count_of(nargsf) != 1 || is_unusual(hot)) return PyObject_Vectorcall(hook->slow, args, nargsf, names);

    PyObject *loader = PyObject_GetAttr(args[0], tag_name);
    if (!loader) return NULL;

    long long t, spent;
    int failed = begin_wait(hot, loader, &t), status = 0;
    PyObject *result = NULL;
    if (!failed || !fail_open(hot)) result = PyObject_Vectorcall(hook->original, args, nargsf, names);
    else failed = 1;

    if (!failed) status = end_phase(hot, result, INPUT_WAIT, &hot->input_ns, t, &spent);
    if (status > 0) status = result ? note_batch(hook, loader, result) : note_end(hot, loader, spent);
    Py_DECREF(loader);
    return checked(result, status);
}

/* ---- the type ---- */

static PyObject *hook_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *hot, *original, *slow, *helper = NULL, *module = NULL, *tensor_type = NULL, *is_grad_enabled = NULL;
    int kind;
    if ((kwargs && PyDict_Size(kwargs))
        || !PyArg_ParseTuple(args, "O!iOO|OOOO:Hook", hot_fields_type, &hot, &kind, &original, &slow, &helper, &module,
                             &tensor_type, &is_grad_enabled))
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_TypeError, "Hook takes no keyword arguments");

    Hook *hook = (Hook *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!hook) return NULL;

    switch (kind) {
    case FORWARD: hook->vectorcall = is_grad_enabled ? call_forward : NULL; break;
    case BACKWARD: hook->vectorcall = helper ? call_backward : NULL; break;
    case OPTIMIZER: hook->vectorcall = call_step; break;
    case INPUT_WAIT: hook->vectorcall = helper ? call_next : NULL; break;
    default: break;
    }

    hook->kind = kind;
    assign((PyObject **)&hook->hot, hot);
    assign(&hook->original, original);
    assign(&hook->slow, slow);
    assign(&hook->helper, helper);
    assign(&hook->module, module);
    assign(&hook->tensor_type, tensor_type);
    assign(&hook->is_grad_enabled, is_grad_enabled);
    if (hook->vectorcall) return (PyObject *)hook;

    Py_DECREF(hook);
    return PyErr_Format(PyExc_ValueError, "no hook for phase %d with these arguments", kind);
}

/* Like a function: `optimizer.step` is a bound method. */
static PyObject *hook_get(PyObject *self, PyObject *object, PyObject *type) {
    (void)type;
    if (object && object != Py_None) return PyObject_CallFunctionObjArgs(method_type, self, object, NULL);

    Py_INCREF(self);
    return self;
}

#define EACH_OBJECT(DO) \
    DO(hot) DO(original) DO(slow) DO(helper) DO(module) DO(tensor_type) DO(is_grad_enabled) DO(dict)

static int hook_traverse(PyObject *self, visitproc visit, void *arg) {
    Hook *hook = (Hook *)self;
    Py_VISIT(Py_TYPE(self));
#define VISIT(name) Py_VISIT(hook->name);
    EACH_OBJECT(VISIT)
#undef VISIT
    return 0;
}

/* What a call needs stays until the end: the collector may clear a hook that an object of its cycle still calls. */
static int hook_clear(PyObject *self) {
    Py_CLEAR(((Hook *)self)->dict);
    return 0;
}

static void hook_dealloc(PyObject *self) {
    Hook *hook = (Hook *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (hook->weakrefs) PyObject_ClearWeakRefs(self);
#define CLEAR(name) Py_CLEAR(hook->name);
    EACH_OBJECT(CLEAR)
#undef CLEAR
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Hook, vectorcall), READONLY, NULL},
    {"__dictoffset__", T_PYSSIZET, offsetof(Hook, dict), READONLY, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Hook, weakrefs), READONLY, NULL},
    {"kind", T_INT, offsetof(Hook, kind), READONLY, NULL},
    {"original", T_OBJECT, offsetof(Hook, original), READONLY, NULL},
    {"module", T_OBJECT, offsetof(Hook, module), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef attributes[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject *make_hook_type(void) {
    static PyType_Slot slots[] = {
        {Py_tp_new, hook_new}, {Py_tp_call, PyVectorcall_Call}, {Py_tp_descr_get, hook_get},
        {Py_tp_traverse, hook_traverse}, {Py_tp_clear, hook_clear}, {Py_tp_dealloc, hook_dealloc},
        {Py_tp_members, members}, {Py_tp_getset, attributes}, {0, NULL},
    };
    static PyType_Spec spec = {
        "traceml.instrument.native._hot_path.Hook", sizeof(Hook), 0,
        (unsigned int)(Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | VECTORCALL_FLAG | METHOD_DESCRIPTOR_FLAG), slots};
    PyObject *types = PyImport_ImportModule("types");
    method_type = types ? PyObject_GetAttrString(types, "MethodType") : NULL;
    Py_XDECREF(types);
    shape_name = PyUnicode_InternFromString("shape");
    tag_name = PyUnicode_InternFromString("_traceml_loader");
    trains_names = Py_BuildValue("(s)", "trains");
    return method_type && shape_name && tag_name && trains_names ? (PyTypeObject *)PyType_FromSpec(&spec) : NULL;
}
