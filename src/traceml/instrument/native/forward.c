/* The hook around the outermost call of a model. */
#include "hook.h"

#define MOST_ON_STACK 8

static PyObject *trains_names;

COLD static PyObject *call_with_many(PyObject *function, PyObject *first, PyObject *const *args, Py_ssize_t n,
                                     Py_ssize_t all, PyObject *names) {
    PyObject **values = PyMem_Malloc((size_t)(all + 2) * sizeof *values);
    if (!values) return PyErr_NoMemory();

    values[1] = first;
    memcpy(values + 2, args, (size_t)all * sizeof *values);
    PyObject *result = PyObject_Vectorcall(function, values + 1, (size_t)(n + 1) | ARGUMENTS_OFFSET, names);
    PyMem_Free(values);
    return result;
}

/* Call a function with one more argument, before the others. */
static inline PyObject *call_with(PyObject *function, PyObject *first, PyObject *const *args, Py_ssize_t n,
                                  PyObject *names) {
    Py_ssize_t all = n + (names ? PyTuple_Size(names) : 0);
    if (!LIKELY(all <= MOST_ON_STACK)) return call_with_many(function, first, args, n, all, names);

    PyObject *values[MOST_ON_STACK + 2]; /* its first place is the called function's to use */
    values[1] = first;
    switch (all) { /* a loop or memcpy costs more than the few words that most models take */
    default: memcpy(values + 4, args + 2, (size_t)(all - 2) * sizeof *values); /* fall through */
    case 2: values[3] = args[1]; /* fall through */
    case 1: values[2] = args[0]; /* fall through */
    case 0: break;
    }

    return PyObject_Vectorcall(function, values + 1, (size_t)(n + 1) | ARGUMENTS_OFFSET, names);
}

COLD static int measure(Hook *hook, PyObject *module, PyObject *const *args, Py_ssize_t n, PyObject *names) {
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
static inline int has_known_shape(Hook *hook, PyObject *const *args, Py_ssize_t n) {
    if (!n || (PyObject *)Py_TYPE(args[0]) != hook->tensor_type) return 0;

    PyObject *shape = hook->get_shape(hook->shape, args[0], hook->tensor_type);
    int is_equal = shape ? PyObject_RichCompareBool(shape, none_for_null(hook->hot->input_shape), Py_EQ) : -1;
    Py_XDECREF(shape);
    return is_equal;
}

/* True or False; NULL with an exception. */
static inline PyObject *asks_for_gradients(Hook *hook) {
    PyObject *trains = hook->grad_enabled ? hook->grad_enabled(hook->grad_self, NULL)
                                          : PyObject_Vectorcall(hook->is_grad_enabled, NULL, 0, NULL);
    Py_XDECREF(trains); /* one of two constants */
    return trains;
}

COLD static int forward_begins(Hook *hook, long long t, PyObject *trains) {
    PyObject *method = PyObject_GetAttrString((PyObject *)hook->hot, "forward_begins"), *number = PyLong_FromLongLong(t);
    PyObject *values[] = {number, hook->module, trains}, *result = NULL;
    if (method && number) result = PyObject_Vectorcall(method, values, 2, trains_names);
    Py_XDECREF(method);
    Py_XDECREF(number);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

static inline int begin_forward(Hook *hook, PyObject *module, PyObject *const *args, Py_ssize_t n, PyObject *names,
                                long long *t) {
    HotFields *hot = hook->hot;
    int is_known = has_known_shape(hook, args, n);
    if (is_known < 0 || (!LIKELY(is_known) && measure(hook, module, args, n, names)) || read_clock(t)) return -1;

    PyObject *trains = asks_for_gradients(hook);
    if (!trains) return -1;

    int status = 0;
    if (trains == Py_False || hot->closes_at == hot->check_forward)
        status = forward_begins(hook, *t, trains == Py_False ? Py_False : Py_True);
    else if (hot->closes_at == hot->on_forward)
        status = commit_step(hot, *t);

    return status ? -1 : begin_phase(hot, FORWARD, *t);
}

PyObject *call_forward(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *names) {
    Hook *hook = (Hook *)self;
    HotFields *hot = hook->hot;
    if (!LIKELY(is_usual(hot))) return call_slow(hook, args, nargsf, names);

    Py_ssize_t n = count_of(nargsf);
    PyObject *module = PyWeakref_GetObject(hook->module), *result = NULL;
    Py_XINCREF(module);
    long long t, spent;
    int failed = module ? begin_forward(hook, module, args, n, names, &t) : -1;
    if (LIKELY(!failed) || !fail_open(hot))
        result = LIKELY(hook->passes_module) ? call_with(hook->original, none_for_null(module), args, n, names)
                                     : PyObject_Vectorcall(hook->original, args, nargsf, names);
    else failed = 1;

    Py_XDECREF(module);
    return failed ? result : checked(result, end_phase(hot, result, FORWARD, &hot->forward_ns, t, &spent));
}

int prepare_forward(Hook *hook) {
    if (!trains_names) trains_names = Py_BuildValue("(s)", "trains");
    if (!trains_names) return -1;

    hook->shape = PyObject_GetAttrString(hook->tensor_type, "shape");
    if (!hook->shape) return -1;

    hook->get_shape = (descrgetfunc)PyType_GetSlot(Py_TYPE(hook->shape), Py_tp_descr_get);
    if (PyCFunction_Check(hook->is_grad_enabled) && PyCFunction_GetFlags(hook->is_grad_enabled) == METH_NOARGS)
        hook->grad_enabled = PyCFunction_GetFunction(hook->is_grad_enabled);

    hook->grad_self = hook->grad_enabled ? PyCFunction_GetSelf(hook->is_grad_enabled) : NULL;
    return 0;
}
