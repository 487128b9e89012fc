/* What a row's loss, gradient and statistics are made of, whichever threads hold it.

   Design
   ------
   1. A kernel's *home* knows where a row's numbers are and calls a function for each of them, or writes what one
      returns; its *team* are the threads that share the row. `do_row` is all that there is to know of the formula.
   2. Exponentials are those of x - m, with m the maximum, never of less shifted numbers. Terms of the maximum are
      counted instead of added: the rest of the sum keeps its accuracy however small it is, log s = log1p(rest), and
      p_y - 1 is minus the others' share.
   3. m starts at the lowest finite number: -inf needs no care then, and a row without any maximum is told by the count.
   4. Where a row is on chip, the maximum is found first. Where it is not, sums are kept relative to the largest number
      so far and moved whenever that grows, so that memory is read once for them and once for the gradient.
   5. All of a team take the same path, rows that are skipped included: these have nothing to fold and write zeros.
*/

/* What is summed over the classes, beside the exponentials: q is the target's distribution times the class weights. */
enum {
    LOW,  /* exp(d) of all but the maxima */
    TOPS, /* how many maxima */
    SHARE,
    SHARE_D,
    PROB,
    PROB_D,
    ENTROPY,
    ALL_SUMS
};
FC_DEVICE constexpr bool is_summed(int k) {
    return k <= TOPS || (k <= SHARE_D && FC_SHARES > 0) || (k >= PROB && k <= PROB_D && FC_SHARES == 2 && FC_STATS) ||
           (k == ENTROPY && FC_STATS);
}

/* Logits of 16 bits take the faster one: its error grows by half a unit in the last place for every unit of x, no more
   than x itself may be off by its rounding, and saves a quarter of all instructions. */
FC_DEVICE real exp_of(real x) {
    return sizeof(number) == 2 ? (real)exp_fast((float)x) : exp(x);
}
/* The other one where one is NaN. */
FC_DEVICE real larger(real x, real y) { return fmax(x, y); }
FC_DEVICE real lowest() {
#if FC_DOUBLE
    return -1.7976931348623157e308;
#else
    return -3.402823466e38f;
#endif
}
FC_DEVICE real not_a_number() { return infinity((real)0) - infinity((real)0); }

/* The options as the arithmetic's type, and a row's share of them. */
struct Setting {
    real scale, scale_rest; /* their product is `logit_scale` */
    real cap, cap_step, cap_rest; /* under FC_CAP */
    real even;   /* label_smoothing / n_classes */
    real chosen; /* (1 - label_smoothing), times the class weight of the target if that is an index */
    int y;
    const char* prob; /* the row of probabilities */
};

FC_DEVICE Setting read_setting(const Task& task, const Row& r, int64 row) {
    Setting o;
    o.scale = (real)task.scale_steps[0];
    o.scale_rest = (real)task.scale_steps[1];
    o.cap = (real)task.softcap;
    o.cap_step = (real)task.cap_steps[0];
    o.cap_rest = (real)task.cap_steps[1];
    o.even = (real)(task.label_smoothing / task.n_classes);
    o.chosen = (real)(1 - task.label_smoothing) * (r.y >= 0 ? class_weight(task, r.y) : (real)1);
    o.y = r.y;
    o.prob = FC_SHARES == 2 ? task.prob.data + row_offset(task, task.prob.row_strides, row) : nullptr;
    return o;
}

/* What tanh is taken of under a softcap, without its sign. */
FC_DEVICE real cap_part(const Setting& o, real x) {
    const real u = x * o.cap_step * o.cap_rest;
    return u < 0 ? -u : u;
}
/* Whether tanh(u) is u, and 1 - tanh^2 is 1, to rounding: the softcap is the identity there. It has to be told, for u
   may underflow where the logit is large enough to matter. NaN counts as well: it stays NaN, and without a cap, where
   the steps are 0, infinities are such. */
FC_DEVICE bool is_uncapped(real u) {
    const double least = sizeof(real) == 8 ? 7.450580596923828e-9 : 2.44140625e-4; /* 2^-27, 2^-12: u^2 / 3 rounds away */
    return !(u >= (real)least);
}

/* A logit as the maximum is taken of it, and the difference of two of these. That of two logits may be twice the largest
   number where the scaled one is not, so that `scale_rest` is 1/2 then: halves do not overflow, and are exact. */
FC_DEVICE real value_of(const Setting& o, real x) {
    if (!FC_CAP) return x;
    const real u = cap_part(o, x), scaled = o.scale * x * o.scale_rest;
    const real v = o.cap * tanh(u);
    return is_uncapped(u) ? scaled : x < 0 ? -v : v;
}
FC_DEVICE real difference(const Setting& o, real v, real m) { 
    return FC_CAP ? v - m : o.scale * (o.scale_rest * v - o.scale_rest * m);
}
/* The derivative of a capped logit by the scaled one, 1 - tanh^2, without that difference. */
FC_DEVICE real slope_of(const Setting& o, real x) {
    if (!FC_CAP) return 1;
    const real u = cap_part(o, x);
    const real e = exp_of(-2 * u);
    return is_uncapped(u) ? (real)1 : 4 * e / ((1 + e) * (1 + e));
}

FC_DEVICE real prob_of(const Task& task, const Setting& o, int k) {
#if FC_SHARES == 2
    return (real)widen(*reinterpret_cast<const FC_PROB*>(o.prob + k * task.prob.class_stride));
#else
    return 0;
#endif
}
FC_DEVICE real share_of(const Task& task, const Setting& o, int k, real t) {
#if FC_SHARES == 2
    return class_weight(task, k) * (o.chosen * t + o.even);
#else
    return class_weight(task, k) * o.even + (k == o.y ? o.chosen : (real)0);
#endif
}

struct Sums {
    real top;
    real sum[ALL_SUMS];
    int argmax; /* the first class at the top */

    FC_DEVICE void clear(real at) {
        top = at;
        FC_UNROLL
        for (int k = 0; k < ALL_SUMS; k++) sum[k] = 0;
        argmax = 0x7fffffff;
    }
    /* Add a class whose value is not above the top. */
    FC_DEVICE void add(const Task& task, const Setting& o, int k, real v) {
        real d = difference(o, v, top);
        bool is_top = v == top;
        real e = exp_of(d);
        sum[LOW] += is_top ? (real)0 : e;
        sum[TOPS] += is_top ? (real)1 : (real)0;
        if (FC_SHARES > 0) {
            real t = prob_of(task, o, k);
            real q = share_of(task, o, k, t);
            sum[SHARE] += q;
            sum[SHARE_D] += q == 0 ? (real)0 : q * d;
            if (FC_SHARES == 2 && FC_STATS) {
                sum[PROB] += t;
                sum[PROB_D] += t == 0 ? (real)0 : t * d;
            }
        }
        if (FC_STATS) {
            sum[ENTROPY] += e > 0 && !is_top ? e * d : (real)0;
            if (is_top && k < argmax) argmax = k;
        }
    }
    /* Make the sums relative to a top that is not below the present one. */
    FC_DEVICE void raise(const Setting& o, real to) {
        if (!(to > top)) return;
        real d = difference(o, top, to);
        real all = sum[LOW] + sum[TOPS];
        real k = exp_of(d);
        if (FC_SHARES > 0 && sum[SHARE] != 0) sum[SHARE_D] += sum[SHARE] * d;
        if (FC_SHARES == 2 && FC_STATS && sum[PROB] != 0) sum[PROB_D] += sum[PROB] * d;
        if (FC_STATS && k > 0) sum[ENTROPY] = k * (sum[ENTROPY] + all * d);
        if (FC_STATS && !(k > 0)) sum[ENTROPY] = 0;
        sum[LOW] = all == 0 ? (real)0 : all * k;
        sum[TOPS] = 0;
        argmax = 0x7fffffff;
        top = to;
    }
};

/* All that the gradient needs to know of a row. */
struct Finished {
    real top, rest, s, log_s;
    real slant;  /* of the loss by the log of the sum: the shares and the z loss */
    real factor; /* of the row's gradient, over s; 0 where there is none */
    real peak;   /* the gradient at an index target */
    bool has_grad;
};

/* Write a row's loss and statistics; `first` tells which thread of the team does it. */
FC_DEVICE Finished finish_row(
        const Task& task, const Setting& o, const Row& r, int64 row, const Sums& a, real x_y, bool first) {
    Finished f;
    const bool kept = r.weight != 0;
    const bool indexed = FC_SHARES < 2 && r.y >= 0;
    const real v_y = indexed ? value_of(o, x_y) : (real)0;
    real share = FC_SHARES > 0 ? a.sum[SHARE] : (real)0, share_d = FC_SHARES > 0 ? a.sum[SHARE_D] : (real)0;
    f.top = a.top;
#if FC_NORMALIZED
    const real d_y = indexed ? x_y : (real)0, lse = 0;
    f.rest = f.log_s = 0;
    f.s = 1;
#else
    const real d_y = indexed ? (v_y == a.top ? (real)0 : difference(o, v_y, a.top)) : (real)0;
    f.rest = a.sum[LOW] + (a.sum[TOPS] > 0 ? (a.sum[TOPS] - 1) + (a.top - a.top) : not_a_number());
    f.s = 1 + f.rest;
    f.log_s = log1p(f.rest);
    real lse = (FC_CAP ? a.top : o.scale * (o.scale_rest * a.top)) + f.log_s;
    if (FC_SHARES < 2 && task.target == nullptr) {
        /* Alone, it is more than a loss's: infinite where a maximum is, and where there is none. */
        if (a.sum[TOPS] == 0) lse = a.sum[LOW] == 0 ? -infinity((real)0) : not_a_number();
        if (a.top == infinity((real)0)) lse = a.top + a.sum[LOW];
    }
#endif
    if (FC_SHARES == 0 && indexed) {
        share = o.chosen;
        share_d = o.chosen == 0 ? (real)0 : o.chosen * d_y;
    }
    const real z = (real)task.z_loss;
    if (first) {
        if (task.loss != nullptr) {
            real loss = share * f.log_s - share_d + (z == 0 ? (real)0 : z * lse * lse);
            loss = kept ? (real)(r.weight * loss) : (real)0;
            task.loss[row] = r.bad ? not_a_number() : loss;
        }
        if (task.lse != nullptr) task.lse[row] = kept ? lse : (real)0;
        if (FC_STATS) {
            real log_prob = FC_SHARES == 2 ? a.sum[PROB_D] - a.sum[PROB] * f.log_s : d_y - f.log_s;
            if (task.log_prob != nullptr) task.log_prob[row] = kept ? log_prob : (real)0;
            if (task.entropy != nullptr) task.entropy[row] = kept ? f.log_s - a.sum[ENTROPY] / f.s : (real)0;
            if (task.argmax != nullptr) task.argmax[row] = kept && f.s == f.s ? a.argmax : -1;
        }
        if (r.bad && task.error != nullptr) lower_word(task.error, row);
    }
    if (FC_OUT == 1) {
        const double normalizer = task.normalizer == nullptr ? 1 : *task.normalizer;
        f.has_grad = kept && normalizer != 0;
        /* The row's share first: it is in range where the normalizer's inverse may not be. */
        const double factor = f.has_grad ? r.weight / normalizer * task.factor * item(task.grad_output, row) : 0;
        const real whole = (real)(factor * task.logit_scale);
        const real z_slant = z == 0 ? (real)0 : 2 * z * lse;
        f.slant = share + z_slant;
        f.factor = whole / f.s;
        if (FC_SHARES == 0 && indexed) {
            const real e_y = exp_of(d_y);
            const real others = v_y == a.top ? f.rest : f.s - e_y;
            f.peak = whole * (z_slant * (e_y / f.s) - share * (others / f.s)) * slope_of(o, x_y);
        }
    } else {
        f.has_grad = kept;
    }
    return f;
}

FC_DEVICE real grad_of(const Task& task, const Setting& o, const Finished& f, int k, real x) {
    const real v = value_of(o, x);
    const real d = difference(o, v, f.top);
    if (FC_OUT == 3) return (v == f.top ? (real)0 : d) - f.log_s;
    const real e = exp_of(d);
    if (FC_OUT == 2) return e / f.s;
    if (FC_SHARES == 0) {
        const real g = f.factor * f.slant * e * slope_of(o, x);
        return k == o.y ? f.peak : g;
    }
    const real q = share_of(task, o, k, prob_of(task, o, k));
    const real others = v == f.top ? f.rest : f.s - e;
    return f.factor * (e * (f.slant - q) - others * q) * slope_of(o, x);
}

template <class Team, class Home>
FC_DEVICE void do_row(const Task& task, int64 row, const Row& r, Team& team, Home& home, real x_y) {
    const Setting o = read_setting(task, r, row);
    Sums a;
    a.clear(lowest());
    if (!(FC_NORMALIZED && FC_SHARES == 0)) {
        if (FC_NORMALIZED) {
            a.top = 0;
            home.walk([&](int k, real x) {
                real q = share_of(task, o, k, prob_of(task, o, k));
                a.sum[SHARE_D] += q == 0 ? (real)0 : q * x;
            });
        } else if (Home::ON_CHIP) {
            home.walk([&](int, real x) { a.top = larger(value_of(o, x), a.top); });
            a.top = team.max(a.top);
            home.walk([&](int k, real x) { a.add(task, o, k, value_of(o, x)); });
        } else {
            home.walk([&](int k, real x) {
                real v = value_of(o, x);
                a.raise(o, v);
                a.add(task, o, k, v);
            });
            a.raise(o, team.max(a.top));
        }
        team.sum(a.sum);
        if (FC_STATS) a.argmax = team.min(a.argmax);
    }
    const Finished f = finish_row(task, o, r, row, a, x_y, team.is_first());
    if (FC_OUT == 0) return;
    team.settle();
    if (f.has_grad)
        home.write([&](int k, real x) { return grad_of(task, o, f, k, x); });
    else
        home.write([](int, real) { return (real)0; });
}

/* The logit of an index target, which has to be read before anything is written. */
FC_DEVICE real target_logit(const Task& task, const Row& r, const char* logits) {
    return r.y < 0 ? (real)0 : (real)widen(*reinterpret_cast<const number*>(logits + r.y * task.logits.class_stride));
}
