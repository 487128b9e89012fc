/* Constants of the elementary functions. */
#ifndef FASTCE_MATH_H
#define FASTCE_MATH_H

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FASTCE_HAS_FMA 1
#else
#define FASTCE_HAS_FMA 0
#endif
/* -159 log(2): the power of two comes out as 0, and e^x is less than half of the smallest subnormal. */
#define FASTCE_EXP_FLOOR -110.21040f

#endif
