/* The argument of a kernel: one struct by value, and how its operands are read row by row.

   Every field has 8 bytes, so that its layout is the same for every compiler and for `_task.py`, which fills it. */

#define FC_DIMS 8 /* row axes, after merging */

typedef FC_T number; /* the logits' type, and that of the arithmetic */
#if FC_DOUBLE
typedef double real;
#else
typedef float real;
#endif

struct Vector { /* one number per row, or NULL; `step` is 0 if all rows have the same one, else 1 */
    const void* data;
    int64 is_double, step;
};

struct Matrix { /* rows and classes, strides in bytes */
    char* data;
    int64 is_dense; /* 1 if neither classes nor rows have a gap between them */
    int64 class_stride;
    int64 row_strides[FC_DIMS];
};

struct Task {
    Matrix logits, prob, out;
    const char* target;
    int64 target_strides[FC_DIMS];
    int64 target_size; /* bytes; negative if unsigned */
    int64 ignore_index;
    const real* weight;
    Vector sample_weight, grad_output;
    real* loss; /* this and the next four: one entry for each row */
    real* lse;
    real* log_prob;
    real* entropy;
    int64* argmax;
    int64 n_rows, n_classes, n_dims;
    int64 shape[FC_DIMS]; /* of the rows, as the strides have it */
    double factor, label_smoothing, z_loss, logit_scale, softcap;
    double scale_steps[2], cap_steps[2]; /* logit_scale, and logit_scale / softcap, as products: see `_task.py` */
    const double* normalizer; /* NULL: 1 */
    int64* error;             /* the least error_call + row of those with a target that does not exist */
    int64 error_call;
    /* Of sums over the rows alone: */
    double* slots;
    unsigned* counter;
    double* total;
    real* result;
    double on_empty;
};
static_assert(sizeof(Task) == FC_TASK_BYTES, "_task.py describes another struct");

FC_DEVICE int64 row_offset(const Task& task, const int64* strides, int64 row) {
    int64 offset = 0;
    for (int d = (int)task.n_dims - 1; d > 0; d--) {
        int64 rest = row / task.shape[d];
        offset += (row - rest * task.shape[d]) * strides[d];
        row = rest;
    }
    return offset + row * strides[0];
}

FC_DEVICE double item(const Vector& vector, int64 row) {
    if (vector.data == nullptr) return 1;
    return vector.is_double ? static_cast<const double*>(vector.data)[row * vector.step]
                            : (double)static_cast<const float*>(vector.data)[row * vector.step];
}

template <class Integer>
FC_DEVICE int64 read_once(const char* place) {
    return (int64)*reinterpret_cast<const volatile Integer*>(place);
}

/* Unsigned class indices of 64 bits keep their bits, as `ignore_index` does; the others keep their value. Each is read
   once: another stream may change it meanwhile, and the index that is used must be the one that was checked. */
FC_DEVICE int64 target_of(const Task& task, int64 row) {
    const char* place = task.target + row_offset(task, task.target_strides, row);
    switch (task.target_size) {
        case 1: return read_once<signed char>(place);
        case -1: return read_once<unsigned char>(place);
        case 2: return read_once<short>(place);
        case -2: return read_once<unsigned short>(place);
        case 4: return read_once<int>(place);
        case -4: return read_once<unsigned>(place);
        default: return read_once<int64>(place);
    }
}

struct Row {
    double weight; /* the row's sample weight; 0 if it is skipped */
    int y;         /* the target's class, -1 without */
    bool bad;      /* a target that does not exist: skipped, but its loss is NaN */
};

FC_DEVICE Row read_row(const Task& task, int64 row) {
    Row r = {item(task.sample_weight, row), -1, false};
    if (task.target != nullptr) {
        int64 y = target_of(task, row);
        if (y == task.ignore_index) {
            r.weight = 0;
        } else if (y < 0 || y >= task.n_classes) {
            r.weight = 0;
            r.bad = true;
        } else {
            r.y = (int)y;
        }
    }
    if (r.weight == 0) r.y = -1;
    return r;
}

FC_DEVICE real class_weight(const Task& task, int k) {
    return task.weight == nullptr ? (real)1 : task.weight[k];
}
