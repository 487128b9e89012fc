"""The formulas of a row: see `formula.h`."""

cdef extern from "formula.h" nogil:
    double shift_sum "fastce_shift_sum_double"(double sum_ad, double sum_a, double shift)
    double shift_exp_sum "fastce_shift_exp_sum_double"(double sum_ed, double sumexp, double shift, double factor)
    double smooth "fastce_smooth_double"(double one_minus_eps, double wt, double eps_over_c, double w)
    double row_lse "fastce_row_lse_double"(double row_max, double log_sumexp)
    double row_log_prob "fastce_row_log_prob_double"(double sum_t, double sum_td, double log_sumexp)
    double row_entropy "fastce_row_entropy_double"(double sum_ed, double inverse_sumexp, double log_sumexp)
    double z_loss_term "fastce_z_loss_term_double"(double z, double lse)
    double z_loss_slope "fastce_z_loss_slope_double"(double z, double lse)
    double grad_beta "fastce_grad_beta_double"(double upstream, double eps_over_c)
    double grad_gamma "fastce_grad_gamma_double"(double upstream, double one_minus_eps)
    double grad_of_class "fastce_grad_of_class_double"(
        double p, double one_minus_p, double q, double dloss_dlse_less_q)
    double times "fastce_times_double"(double a, double d)
    double nan_unless_finite "fastce_nan_unless_finite_double"(double x)
    double sumexp_excl "fastce_sumexp_excl_double"(double sumexp, double left_out, double now)
    double row_loss "fastce_row_loss_double"(double sum_q, double sum_qd, double log_sumexp)
    double grad_alpha "fastce_grad_alpha_double"(double upstream, double dloss_dlse, double inverse_sumexp)
    # For the logits' arithmetic of either type.
    void softcap_scales_float "fastce_softcap_scales_float"(
        double logit_scale, double softcap, double least_normal, double largest, double* scale, double* cap_factor)
    void softcap_scales_double "fastce_softcap_scales_double"(
        double logit_scale, double softcap, double least_normal, double largest, double* scale, double* cap_factor)
