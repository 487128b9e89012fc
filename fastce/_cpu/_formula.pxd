"""The formulas of a row, from `formula.h`: in float64, and for both types what vector code needs."""
from fastce._cpu._math cimport real

cdef extern from "formula.h" nogil:
    double shift_sum "fastce_shift_sum_double"(double sum_ad, double sum_a, double shift) noexcept
    double shift_exp_sum "fastce_shift_exp_sum_double"(
        double sum_ed, double sumexp, double shift, double factor) noexcept
    double smooth "fastce_smooth_double"(double one_minus_eps, double wt, double eps_over_c, double w) noexcept
    double row_lse "fastce_row_lse_double"(double row_max, double log_sumexp) noexcept
    double row_log_prob "fastce_row_log_prob_double"(double sum_t, double sum_td, double log_sumexp) noexcept
    double row_entropy "fastce_row_entropy_double"(double sum_ed, double inverse_sumexp, double log_sumexp) noexcept
    double z_loss_term "fastce_z_loss_term_double"(double z, double lse) noexcept
    double z_loss_slope "fastce_z_loss_slope_double"(double z, double lse) noexcept
    double grad_beta "fastce_grad_beta_double"(double upstream, double eps_over_c) noexcept
    double grad_gamma "fastce_grad_gamma_double"(double upstream, double one_minus_eps) noexcept
    double grad_of_class "fastce_grad_of_class_double"(
        double p, double one_minus_p, double q, double dloss_dlse_less_q) noexcept
    void softcap_scales_float "fastce_softcap_scales_float"(
        double logit_scale, double softcap, double least_normal, double largest, double* scale,
        double* cap_factor) noexcept
    void softcap_scales_double "fastce_softcap_scales_double"(
        double logit_scale, double softcap, double least_normal, double largest, double* scale,
        double* cap_factor) noexcept
    float times_float "fastce_times_float"(float a, float d) noexcept
    double times_double "fastce_times_double"(double a, double d) noexcept
    float nan_unless_finite_float "fastce_nan_unless_finite_float"(float x) noexcept
    double nan_unless_finite_double "fastce_nan_unless_finite_double"(double x) noexcept
    float sumexp_excl_float "fastce_sumexp_excl_float"(float sumexp, float left_out, float now) noexcept
    double sumexp_excl_double "fastce_sumexp_excl_double"(double sumexp, double left_out, double now) noexcept
    float row_loss_float "fastce_row_loss_float"(float sum_q, float sum_qd, float log_sumexp) noexcept
    double row_loss_double "fastce_row_loss_double"(double sum_q, double sum_qd, double log_sumexp) noexcept
    float grad_alpha_float "fastce_grad_alpha_float"(float upstream, float dloss_dlse, float inverse_sumexp) noexcept
    double grad_alpha_double "fastce_grad_alpha_double"(
        double upstream, double dloss_dlse, double inverse_sumexp) noexcept
    float grad_of_only_class_float "fastce_grad_of_only_class_float"(float one_minus_p, float q) noexcept
    double grad_of_only_class_double "fastce_grad_of_only_class_double"(double one_minus_p, double q) noexcept


cdef inline real times(real a, real d) noexcept nogil:
    if real is float:
        return times_float(a, d)
    else:
        return times_double(a, d)


cdef inline real nan_unless_finite(real x) noexcept nogil:
    if real is float:
        return nan_unless_finite_float(x)
    else:
        return nan_unless_finite_double(x)


cdef inline real sumexp_excl(real sumexp, real left_out, real now) noexcept nogil:
    if real is float:
        return sumexp_excl_float(sumexp, left_out, now)
    else:
        return sumexp_excl_double(sumexp, left_out, now)


cdef inline real row_loss(real sum_q, real sum_qd, real log_sumexp) noexcept nogil:
    if real is float:
        return row_loss_float(sum_q, sum_qd, log_sumexp)
    else:
        return row_loss_double(sum_q, sum_qd, log_sumexp)


cdef inline real grad_alpha(real upstream, real dloss_dlse, real inverse_sumexp) noexcept nogil:
    if real is float:
        return grad_alpha_float(upstream, dloss_dlse, inverse_sumexp)
    else:
        return grad_alpha_double(upstream, dloss_dlse, inverse_sumexp)


cdef inline real grad_of_only_class(real one_minus_p, real q) noexcept nogil:
    if real is float:
        return grad_of_only_class_float(one_minus_p, q)
    else:
        return grad_of_only_class_double(one_minus_p, q)
