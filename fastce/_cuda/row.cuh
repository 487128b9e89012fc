/* From a row's logits to its loss, gradient and statistics, whichever threads hold it.

   Design
   ------
   1. A *held row* knows where a row's numbers are: it calls a function for each of them, or writes what one returns. A
      *team* is the threads that share the row. `process_row` needs no more than these two.
   2. Exponentials are those of x - m, with m the maximum, never of less shifted numbers. Terms of the maximum are
      counted instead of added, so that all but one can be left out of the sum: see `formula.h`.
   3. m starts at the lowest finite number. So -inf needs no case of its own, and a row where all logits are -inf is one
      whose count of maxima is 0.
   4. Where a row is on chip, the maximum is found first. Elsewhere the sums are relative to the largest number so far
      and are moved whenever that grows, so that memory is read once for them and once for the gradient.
   5. All threads of a team take the same path, also for rows that are skipped: there they add nothing and write zeros.
*/

#define FC_REAL real
#define FC_INLINE FC_DEVICE
#define FC_FUNCTION(name) name
#include "../_shared/formula.h"

/* What is summed over the classes; letters as in `formula.h`. */
enum {
    SUMEXP_EXCL_MAXIMA, /* e of all classes but the maxima */
    N_MAXIMA,
    SUM_Q,
    SUM_QD,
    SUM_T,
    SUM_TD,
    SUM_ED,
    ALL_SUMS
};
FC_DEVICE constexpr bool is_summed(int k) {
    return k <= N_MAXIMA || (k <= SUM_QD && FC_TARGET > 0) ||
           (k >= SUM_T && k <= SUM_TD && FC_TARGET == 2 && FC_STATS) || (k == SUM_ED && FC_STATS);
}

/* The fast exponential for logits of 16 bits saves a quarter of all instructions. Its error grows by half a unit in the
   last place for every unit of x, which is no more than the rounding of x itself makes. */
FC_DEVICE real exp_of(real x) {
    return sizeof(number) == 2 ? (real)exp_fast((float)x) : exp(x);
}
/* The larger one; if one is NaN, the other. */
FC_DEVICE real larger(real x, real y) { return fmax(x, y); }
FC_DEVICE real lowest() {
#if FC_DOUBLE
    return -1.7976931348623157e308;
#else
    return -3.402823466e38f;
#endif
}
FC_DEVICE real not_a_number() { return infinity((real)0) - infinity((real)0); }

/* The options in the arithmetic's type, and the row's target. */
struct RowOptions {
    real scale, scale_rest; /* their product is `logit_scale` */
    real cap, cap_step, cap_rest; /* under FC_CAP */
    real one_minus_eps, eps_over_c; /* 1 - label_smoothing, label_smoothing / n_classes */
    int y;
    const char* prob; /* the row of probabilities */
};

FC_DEVICE RowOptions read_options(const Task& task, const Row& r, int64 row) {
    RowOptions o;
    o.scale = (real)task.scale_steps[0];
    o.scale_rest = (real)task.scale_steps[1];
    o.cap = (real)task.softcap;
    o.cap_step = (real)task.cap_steps[0];
    o.cap_rest = (real)task.cap_steps[1];
    o.one_minus_eps = (real)(1 - task.label_smoothing);
    o.eps_over_c = (real)(task.label_smoothing / task.n_classes);
    o.y = r.y;
    o.prob = FC_TARGET == 2 ? task.prob.data + row_offset(task, task.prob.row_strides, row) : nullptr;
    return o;
}

/* The absolute value of the argument of tanh under a softcap. */
FC_DEVICE real cap_part(const RowOptions& o, real x) {
    const real u = x * o.cap_step * o.cap_rest;
    return u < 0 ? -u : u;
}
/* Return true where the softcap is the identity. That needs a case of its own, for u may underflow where the logit is
   large enough to matter. NaN counts as well: it stays NaN, and without a cap, where the steps are 0, infinities are
   such. */
FC_DEVICE bool is_uncapped(real u) { return !(u >= softcap_identity()); }

/* A logit's value, of which the maximum is taken, and the scaled difference of two values. The difference of two logits
   may overflow where the scaled one does not. Then `scale_rest` is 1/2: halves are exact and do not overflow. */
FC_DEVICE real value_of(const RowOptions& o, real x) {
    if (!FC_CAP) return x;
    const real u = cap_part(o, x), scaled = o.scale * x * o.scale_rest;
    const real v = o.cap * tanh(u);
    return is_uncapped(u) ? scaled : x < 0 ? -v : v;
}
FC_DEVICE real difference(const RowOptions& o, real v, real m) { 
    return FC_CAP ? v - m : o.scale * (o.scale_rest * v - o.scale_rest * m);
}
/* The derivative of a capped logit by the scaled one. */
FC_DEVICE real slope_of(const RowOptions& o, real x) {
    if (!FC_CAP) return 1;
    const real u = cap_part(o, x);
    const real e = exp_of(-2 * u);
    return is_uncapped(u) ? (real)1 : softcap_slope(e);
}

/* t of a class. */
FC_DEVICE real target_prob(const Task& task, const RowOptions& o, int k) {
#if FC_TARGET == 2
    return (real)widen(*reinterpret_cast<const FC_PROB*>(o.prob + k * task.prob.class_stride));
#else
    return k == o.y ? (real)1 : (real)0;
#endif
}
/* q of a class from its t. */
FC_DEVICE real smoothed_target(const Task& task, const RowOptions& o, int k, real t) {
    return class_weight(task, k) * smooth(o.one_minus_eps, t, o.eps_over_c, 1);
}

struct Sums {
    real row_max;
    real sum[ALL_SUMS];
    int argmax; /* the first of the maxima */

    FC_DEVICE void clear(real at) {
        row_max = at;
        FC_UNROLL
        for (int k = 0; k < ALL_SUMS; k++) sum[k] = 0;
        argmax = 0x7fffffff;
    }
    /* Add a class whose value is not above the maximum. */
    FC_DEVICE void add(const Task& task, const RowOptions& o, int k, real v) {
        real d = difference(o, v, row_max);
        bool is_max = v == row_max;
        real e = exp_of(d);
        sum[SUMEXP_EXCL_MAXIMA] += is_max ? (real)0 : e;
        sum[N_MAXIMA] += is_max ? (real)1 : (real)0;
        if (FC_TARGET > 0) {
            real t = target_prob(task, o, k);
            real q = smoothed_target(task, o, k, t);
            sum[SUM_Q] += q;
            sum[SUM_QD] += times(q, d);
            if (FC_TARGET == 2 && FC_STATS) {
                sum[SUM_T] += t;
                sum[SUM_TD] += times(t, d);
            }
        }
        if (FC_STATS) {
            sum[SUM_ED] += times(e, d);
            if (is_max && k < argmax) argmax = k;
        }
    }
    /* Make the sums relative to a maximum that is not below the present one. */
    FC_DEVICE void raise(const RowOptions& o, real to) {
        if (!(to > row_max)) return;
        real shift = difference(o, row_max, to);
        real sumexp = sum[SUMEXP_EXCL_MAXIMA] + sum[N_MAXIMA];
        real factor = exp_of(shift);
        if (FC_TARGET > 0) sum[SUM_QD] = shift_sum(sum[SUM_QD], sum[SUM_Q], shift);
        if (FC_TARGET == 2 && FC_STATS) sum[SUM_TD] = shift_sum(sum[SUM_TD], sum[SUM_T], shift);
        if (FC_STATS) sum[SUM_ED] = shift_exp_sum(sum[SUM_ED], sumexp, shift, factor);
        sum[SUMEXP_EXCL_MAXIMA] = times(sumexp, factor);
        sum[N_MAXIMA] = 0;
        argmax = 0x7fffffff;
        row_max = to;
    }
};

/* What the gradient needs of a row's sums. */
struct Finished {
    real row_max, sumexp_excl_max, sumexp, log_sumexp;
    real dloss_dlse;
    real factor;     /* of the row's gradient, over sumexp; 0 where there is none */
    real alpha;      /* factor * dloss_dlse */
    real grad_patch; /* the gradient at an index target */
    bool has_grad;
};

/* Write a row's loss and statistics; `first` tells which thread of the team does it. */
FC_DEVICE Finished finish_row(
        const Task& task, const RowOptions& o, const Row& r, int64 row, const Sums& a, real x_y, bool first) {
    Finished f;
    const bool kept = r.weight != 0;
    const bool indexed = FC_TARGET < 2 && r.y >= 0;
    const real v_y = indexed ? value_of(o, x_y) : (real)0;
    real sum_q = FC_TARGET > 0 ? a.sum[SUM_Q] : (real)0, sum_qd = FC_TARGET > 0 ? a.sum[SUM_QD] : (real)0;
    f.row_max = a.row_max;
#if FC_NORMALIZED
    const real d_y = indexed ? x_y : (real)0, lse = 0;
    f.sumexp_excl_max = f.log_sumexp = 0;
    f.sumexp = 1;
#else
    const real d_y = indexed ? (v_y == a.row_max ? (real)0 : difference(o, v_y, a.row_max)) : (real)0;
    f.sumexp_excl_max =
        a.sum[SUMEXP_EXCL_MAXIMA] +
        (a.sum[N_MAXIMA] > 0 ? (a.sum[N_MAXIMA] - 1) + nan_unless_finite(a.row_max) : not_a_number());
    f.sumexp = 1 + f.sumexp_excl_max;
    f.log_sumexp = log1p(f.sumexp_excl_max);
    real lse = row_lse(FC_CAP ? a.row_max : o.scale * (o.scale_rest * a.row_max), f.log_sumexp);
    if (FC_TARGET < 2 && task.target == nullptr) {
        /* logsumexp: +inf where a logit is, -inf where all are. */
        if (a.sum[N_MAXIMA] == 0) lse = a.sum[SUMEXP_EXCL_MAXIMA] == 0 ? -infinity((real)0) : not_a_number();
        if (a.row_max == infinity((real)0)) lse = a.row_max + a.sum[SUMEXP_EXCL_MAXIMA];
    }
#endif
    if (FC_TARGET == 0 && indexed) {
        sum_q = class_weight(task, r.y); /* no label smoothing */
        sum_qd = times(sum_q, d_y);
    }
    const real z = (real)task.z_loss;
    if (first) {
        if (task.loss != nullptr) {
            const real loss = row_loss(sum_q, sum_qd, f.log_sumexp) + z_loss_term(z, lse);
            task.loss[row] = r.bad ? not_a_number() : kept ? (real)(r.weight * loss) : (real)0;
        }
        if (task.lse != nullptr) task.lse[row] = kept ? lse : (real)0;
        if (FC_STATS) {
            const real log_prob = FC_TARGET == 2 ? row_log_prob(a.sum[SUM_T], a.sum[SUM_TD], f.log_sumexp)
                                                 : row_log_prob(1, d_y, f.log_sumexp);
            const real entropy = row_entropy(a.sum[SUM_ED], 1 / f.sumexp, f.log_sumexp);
            if (task.log_prob != nullptr) task.log_prob[row] = kept ? log_prob : (real)0;
            if (task.entropy != nullptr) task.entropy[row] = kept ? entropy : (real)0;
            if (task.argmax != nullptr) task.argmax[row] = kept && f.sumexp == f.sumexp ? a.argmax : -1;
        }
        if (r.bad && task.error != nullptr) lower_word(task.error, task.error_call + row);
    }
    if (FC_OUT == 1) {
        const double normalizer = task.normalizer == nullptr ? 1 : *task.normalizer;
        f.has_grad = kept && normalizer != 0;
        /* The row's weight first: it is in range where the normalizer's inverse may not be. */
        const double factor = f.has_grad ? r.weight / normalizer * task.factor * item(task.grad_output, row) : 0;
        const real upstream = (real)(factor * task.logit_scale);
        const real z_slope = z_loss_slope(z, lse);
        f.dloss_dlse = sum_q + z_slope;
        f.factor = upstream / f.sumexp;
        f.alpha = grad_alpha(upstream, f.dloss_dlse, 1 / f.sumexp);
        if (FC_TARGET == 0 && indexed) {
            const real e_y = exp_of(d_y);
            const real one_minus_p = sumexp_excl(f.sumexp_excl_max, 1, e_y) / f.sumexp;
            f.grad_patch = upstream * grad_of_class(e_y / f.sumexp, one_minus_p, sum_q, z_slope) * slope_of(o, x_y);
        }
    } else {
        f.has_grad = kept;
    }
    return f;
}

/* The gradient at a class, or its softmax or log-softmax. */
FC_DEVICE real grad_of(const Task& task, const RowOptions& o, const Finished& f, int k, real x) {
    const real v = value_of(o, x);
    const real d = difference(o, v, f.row_max);
    if (FC_OUT == 3) return row_log_prob(1, v == f.row_max ? (real)0 : d, f.log_sumexp);
    const real e = exp_of(d);
    if (FC_OUT == 2) return e / f.sumexp;
    if (FC_TARGET == 0) {
        const real g = f.alpha * e * slope_of(o, x); /* before the choice, which is no branch then */
        return k == o.y ? f.grad_patch : g;
    }
    const real q = smoothed_target(task, o, k, target_prob(task, o, k));
    return f.factor * grad_of_class(e, sumexp_excl(f.sumexp_excl_max, 1, e), q, f.dloss_dlse - q) * slope_of(o, x);
}

template <class Team, class HeldRow>
FC_DEVICE void process_row(const Task& task, int64 row, const Row& r, Team& team, HeldRow& held_row, real x_y) {
    const RowOptions o = read_options(task, r, row);
    Sums a;
    a.clear(lowest());
    if (!(FC_NORMALIZED && FC_TARGET == 0)) {
        if (FC_NORMALIZED) {
            a.row_max = 0;
            held_row.for_each([&](int k, real x) {
                real q = smoothed_target(task, o, k, target_prob(task, o, k));
                a.sum[SUM_QD] += times(q, x);
            });
        } else if (HeldRow::ON_CHIP) {
            held_row.for_each([&](int, real x) { a.row_max = larger(value_of(o, x), a.row_max); });
            a.row_max = team.max(a.row_max);
            held_row.for_each([&](int k, real x) { a.add(task, o, k, value_of(o, x)); });
        } else {
            held_row.for_each([&](int k, real x) {
                real v = value_of(o, x);
                a.raise(o, v);
                a.add(task, o, k, v);
            });
            a.raise(o, team.max(a.row_max));
        }
        team.sum(a.sum);
        if (FC_STATS) a.argmax = team.min(a.argmax);
    }
    const Finished f = finish_row(task, o, r, row, a, x_y, team.is_first());
    if (FC_OUT == 0) return;
    team.sync();
    if (f.has_grad)
        held_row.write([&](int k, real x) { return grad_of(task, o, f, k, x); });
    else
        held_row.write([](int, real) { return (real)0; });
}

/* The logit of an index target; read before anything is written. */
FC_DEVICE real target_logit(const Task& task, const Row& r, const char* logits) {
    return r.y < 0 ? (real)0 : (real)widen(*reinterpret_cast<const number*>(logits + r.y * task.logits.class_stride));
}
