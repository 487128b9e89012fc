/* What this machine's memory takes, and how much arithmetic goes on meanwhile, whatever fastce does:

       cc -O3 -march=native -fopenmp asv_bench/floor.c -o /tmp/floor -lm && /tmp/floor [THREADS] [MIB]

   THREADS is the largest number of threads, by default that of the processors. MIB is the size of an array in DRAM, by
   default 256, or four times the last cache if that is more, but at most an eighth of the memory. It needs a quiet
   machine, and takes less than half a minute.

   Design
   1. The first table has the floors. Each thread runs through arrays of its own, over and over: together they fill half
      a cache at most, or are its share of two arrays in DRAM. A time is that of all threads, divided by the lines of
      one array that all of them saw. GB/s counts the bytes that are read, and those that are written.
   2. The second table adds arithmetic: the exponential of each float, by a polynomial of degree 6, and their sum, 14
      operations. "Arithmetic" is that in L1. "Overlap" is 1 if both together take as long as the slower one of memory
      and arithmetic, and 0 if they take the sum.
   3. "Another array": the arithmetic stays in L1 while lines of an array in DRAM are prefetched, which nobody reads.
      Prefetching into L1 may hold what the arithmetic's own loads wait for; then prefetching into L2 takes less. Where
      it takes less than memory does, the processor dropped prefetches.
   4. Everything is timed once in each round, and each round begins with something else. Lower quartiles count. */
#define _GNU_SOURCE
#include <math.h>
#include <omp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* As wide as the registers: compilers take wider vectors apart badly. */
#if defined(__AVX512F__)
#define WIDTH 64
#define X86(name) _mm512_##name
#elif defined(__AVX__)
#define WIDTH 32
#define X86(name) _mm256_##name
#else
#define WIDTH 16
#define X86(name) _mm_##name
#endif
typedef float Floats __attribute__((vector_size(WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(WIDTH)));

#if defined(__clang__)
#define STORE_PAST_CACHES(p, v) __builtin_nontemporal_store(v, p)
#elif defined(__x86_64__)
#include <immintrin.h>
#define STORE_PAST_CACHES(p, v) X86(stream_ps)((float*)(p), v)
#else
#define STORE_PAST_CACHES(p, v) abort()
#define LACKS_STORE_PAST_CACHES
#endif

enum { LINE = 64, STEP = 4 * LINE, KIB = 1 << 10, MIB = 1 << 20 }; /* bytes */
enum { ROUNDS = 11, LEAST_ROUNDS = 3, MOST_SECONDS = 20 };
enum { NOWHERE, INTO_L2 = 2, INTO_L1 = 3 }; /* as __builtin_prefetch has them */
typedef enum { L1, L2, L3, DRAM, N_PLACES } Place;
typedef enum { READ, IN_PLACE, COPY, COPY_PAST_CACHES, N_KINDS } Kind;

typedef struct {
    char *x, *y;
    const char* asked; /* what is asked for when the beginning of x is read */
    size_t size;       /* of x and y in bytes, a power of two */
    size_t n;          /* bytes of x to see, over and over */
    float one;         /* 1, but the compiler does not know */
} Run;

/* e^x = 2^n 2^f: n is an integer and goes into the exponent; f is in [-1/2, 1/2]. */
static inline Floats exponential(Floats x) {
    const float magic = 12582912; /* 1.5 * 2^23: added to it, a float leaves an integer in the lowest bits */
    Floats t = x * 1.44269504f + magic;
    Floats f = x * 1.44269504f - (t - magic);
    Floats p = f * 1.5403530e-4f + 1.3333558e-3f; /* log(2)^k / k! */
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return (Floats)((Bits)p + ((Bits)t << 23));
}

static inline __attribute__((always_inline)) float run_through(const Run* run, Kind kind, bool with_exp, int into) {
    Floats sums[4] = {{0}};
    for (size_t i = 0; i < run->n; i += STEP) {
        size_t at = i & (run->size - 1);
        Floats *x = (Floats*)(run->x + at), *y = (Floats*)(run->y + at);
        for (int k = 0; k < STEP; k += LINE) {
            if (into == INTO_L1) __builtin_prefetch(run->asked + i + k, 0, INTO_L1);
            if (into == INTO_L2) __builtin_prefetch(run->asked + i + k, 0, INTO_L2);
        }
        for (int k = 0; k < STEP / WIDTH; k++) {
            Floats v = x[k];
            if (with_exp) sums[k % 4] += exponential(v);
            if (kind == READ && !with_exp) sums[k % 4] += v;
            if (kind == IN_PLACE) x[k] = v * run->one;
            if (kind == COPY) y[k] = v;
            if (kind == COPY_PAST_CACHES) STORE_PAST_CACHES(y + k, v);
        }
    }
    float sum = 0;
    for (int k = 0; k < WIDTH / 4; k++) sum += sums[0][k] + sums[1][k] + sums[2][k] + sums[3][k];
    return sum;
}

#define LOOP(name, ...)                                                         \
    static float name(const Run* run) { return run_through(run, __VA_ARGS__); }
LOOP(read_all, READ, false, NOWHERE)
LOOP(in_place, IN_PLACE, false, NOWHERE)
LOOP(copy, COPY, false, NOWHERE)
LOOP(copy_past_caches, COPY_PAST_CACHES, false, NOWHERE)
LOOP(exp_read, READ, true, NOWHERE)
LOOP(exp_read_into_l1, READ, true, INTO_L1)
LOOP(exp_read_into_l2, READ, true, INTO_L2)
LOOP(exp_in_place, IN_PLACE, true, NOWHERE)
LOOP(exp_in_place_into_l1, IN_PLACE, true, INTO_L1)
LOOP(exp_in_place_into_l2, IN_PLACE, true, INTO_L2)

typedef struct {
    const char* name;
    float (*loop)(const Run*);
    Kind kind;
    Place place;
    int ahead; /* bytes from what is read to what is asked for, or: */
} Way;
enum { ANOTHER_ARRAY = -1 };

#define FLOORS(place)                         \
    {"reading", read_all, READ, place, 0},    \
    {"x *= 1", in_place, IN_PLACE, place, 0}, \
    {"copy", copy, COPY, place, 0},           \
    {"non-temporal copy", copy_past_caches, COPY_PAST_CACHES, place, 0}
#define BOTH(name, suffix, ahead)                            \
    {"reading, " name, exp_read##suffix, READ, DRAM, ahead}, \
    {"x *= 1, " name, exp_in_place##suffix, IN_PLACE, DRAM, ahead}
static const Way WAYS[] = {
    FLOORS(L1),
    FLOORS(L2),
    FLOORS(L3),
    FLOORS(DRAM),
    {"arithmetic", exp_read, READ, L1, 0},
    {"arithmetic", exp_in_place, IN_PLACE, L1, 0},
    BOTH("no prefetch", , 0),
    BOTH("prefetcht0 512 bytes ahead", _into_l1, 512),
    BOTH("prefetcht0 2 KiB ahead", _into_l1, 2 * KIB),
    BOTH("prefetcht0 8 KiB ahead", _into_l1, 8 * KIB),
    BOTH("prefetcht1 2 KiB ahead", _into_l2, 2 * KIB),
    BOTH("prefetcht1 8 KiB ahead", _into_l2, 8 * KIB),
    BOTH("prefetcht1 32 KiB ahead", _into_l2, 32 * KIB),
    {"another array, prefetcht0", exp_read_into_l1, READ, L1, ANOTHER_ARRAY},
    {"another array, prefetcht1", exp_read_into_l2, READ, L1, ANOTHER_ARRAY},
};
enum { N_WAYS = sizeof WAYS / sizeof *WAYS, ARITHMETIC = N_PLACES * N_KINDS, OVERLAPS = ARITHMETIC + 2 };
enum { MOST_TEAMS = 16 };

static int teams[MOST_TEAMS], n_teams;             /* numbers of threads */
static double samples[MOST_TEAMS][N_WAYS][ROUNDS]; /* ns for a line */
static size_t cache_bytes[DRAM];                   /* 0 where there is none */
static size_t n_bytes;                             /* of each of: */
static char *large_x, *large_y;
static volatile float sink, one = 1; /* what is stored must be computed, what is loaded is not known */

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

static size_t power_of_two(size_t most) {
    while (most & (most - 1)) most &= most - 1;
    return most;
}

/* Return the size of a thread's array; 0 if there is no such place. */
static size_t choose_size(const Way* way, int n_threads) {
    size_t share = power_of_two(n_bytes / n_threads);
    if (way->place == DRAM) return share;
    size_t bytes = cache_bytes[way->place] / 2;
    if (way->place == L3) { /* which others use too, perhaps of other virtual machines */
        bytes = smaller(bytes / n_threads, 4 * cache_bytes[L2]);
        if (bytes <= cache_bytes[L2]) return 0;
    }
    return smaller(share, power_of_two(way->kind < COPY ? bytes : bytes / 2));
}

/* Return nanoseconds for a line; NaN if that is not available. */
static double sample(const Way* way, int n_threads) {
    size_t share = power_of_two(n_bytes / n_threads), size = choose_size(way, n_threads);
    size_t n = way->place == DRAM || way->ahead == ANOTHER_ARRAY ? share : smaller(share, 64 * MIB);
    if (!size) return NAN;
#ifdef LACKS_STORE_PAST_CACHES
    if (way->kind == COPY_PAST_CACHES) return NAN;
#endif
    double start = 0;
#pragma omp parallel num_threads(n_threads)
    {
        char* x = large_x + omp_get_thread_num() * share;
        char* y = large_y + omp_get_thread_num() * share;
        Run run = {x, y, way->ahead == ANOTHER_ARRAY ? y : x + way->ahead, size, n, one};
#pragma omp barrier /* to wake threads is not timed */
#pragma omp master
        start = omp_get_wtime();
        sink = way->loop(&run);
    }
    return 1e9 * (omp_get_wtime() - start) * LINE / n / n_threads;
}

static int compare(const void* a, const void* b) {
    double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

/* Fill and sort the samples; return how many there are. */
static int measure(void) {
    double end = omp_get_wtime() + MOST_SECONDS;
    int n = 0, n_pairs = n_teams * N_WAYS;
    for (; n < ROUNDS && (n < LEAST_ROUNDS || omp_get_wtime() < end); n++)
        for (int k = 0; k < n_pairs; k++) {
            int pair = (k + n * n_pairs / ROUNDS) % n_pairs, team = pair / N_WAYS, way = pair % N_WAYS;
            samples[team][way][n] = sample(&WAYS[way], teams[team]);
        }
    for (int pair = 0; pair < n_pairs; pair++) qsort(samples[pair / N_WAYS][pair % N_WAYS], n, sizeof(double), compare);
    return n;
}

/* Return a number that Linux tells of a cache of the first processor, or 0. */
static long read_number(int cache, const char* name) {
    char path[80];
    long number = 0;
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/%s", cache, name);
    FILE* file = fopen(path, "r");
    if (file && fscanf(file, "%ld", &number) != 1) number = 0;
    if (file) fclose(file);
    return number;
}

static void find_caches(void) {
    for (int i = 7; i >= 0; i--) { /* backwards, for the cache of instructions comes after that of data */
        long level = read_number(i, "level");
        if (level >= 1 && level <= 3) cache_bytes[level - 1] = read_number(i, "size") * KIB;
    }
    if (!cache_bytes[L1]) cache_bytes[L1] = 32 * KIB; /* guesses */
    if (!cache_bytes[L2]) cache_bytes[L2] = MIB;
}

static char* allocate(int n_threads) {
    size_t size = n_bytes + MIB; /* prefetches go beyond the end */
    char* array = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (array == MAP_FAILED) {
        perror("floor");
        exit(1);
    }
#ifdef MADV_HUGEPAGE
    madvise(array, size, MADV_HUGEPAGE); /* as NumPy does */
#endif
#pragma omp parallel for num_threads(n_threads) /* memory is near the thread that writes to it first */
    for (size_t i = 0; i < size / sizeof(float); i++) ((float*)array)[i] = -1e-3f * (i % 10000);
    return array;
}

/* Return the largest relative error of the exponentials. */
static double find_error(void) {
    double worst = 0;
    for (int i = 0; i < 10000; i++) {
        Floats x = (Floats){0} - 1e-3f * i;
        worst = fmax(worst, fabs(exponential(x)[0] / exp(x[0]) - 1));
    }
    return worst;
}

static void print_floors(int team, int quartile) {
    static const char* const places[] = {"L1", "L2", "L3", "DRAM"};
    for (int i = 0; i < ARITHMETIC; i++) {
        double ns = samples[team][i][quartile];
        if (i % N_KINDS == 0) printf("| %7d | %-5s |", teams[team], places[WAYS[i].place]);
        if (isnan(ns))
            printf(" %17s |", "not available");
        else
            printf(" %8.3f (%6.1f) |", ns, (WAYS[i].kind == READ ? 1 : 2) * LINE / ns);
        if (i % N_KINDS == N_KINDS - 1) printf("\n");
    }
}

static void print_overlaps(int team, int quartile) {
    for (int i = OVERLAPS; i < N_WAYS; i++) {
        double memory = samples[team][DRAM * N_KINDS + WAYS[i].kind][quartile];
        double arithmetic = samples[team][ARITHMETIC + WAYS[i].kind][quartile];
        double both = samples[team][i][quartile];
        double overlap = (memory + arithmetic - both) / fmin(memory, arithmetic);
        printf("| %7d | %-35s | %6.3f | %10.3f | %6.3f |", teams[team], WAYS[i].name, memory, arithmetic, both);
        printf(" %6.2f | %7.2f |\n", both / memory, overlap);
    }
}

int main(int n_arguments, char** arguments) {
    find_caches();
    size_t last = cache_bytes[L3] ? cache_bytes[L3] : cache_bytes[L2], most = sysconf(_SC_PHYS_PAGES) / 8;
    int most_threads = n_arguments > 1 ? atoi(arguments[1]) : omp_get_num_procs();
    n_bytes = smaller(4 * last > 256 * MIB ? 4 * last : 256 * MIB, most * sysconf(_SC_PAGESIZE));
    if (n_arguments > 2) n_bytes = strtoul(arguments[2], NULL, 10) * MIB;
    if (most_threads < 1 || n_bytes < MIB) {
        fprintf(stderr, "usage: floor [THREADS] [MIB]\n");
        return 2;
    }
    large_x = allocate(most_threads);
    large_y = allocate(most_threads);
    for (int n = 1; n < most_threads && n_teams < MOST_TEAMS - 1; n *= 2) teams[n_teams++] = n;
    teams[n_teams++] = most_threads;
    int rounds = measure();

    printf("%d processors; caches of %zu, %zu and %zu KiB; two arrays of %zu MiB in DRAM\n", omp_get_num_procs(),
        cache_bytes[L1] / KIB, cache_bytes[L2] / KIB, cache_bytes[L3] / KIB, n_bytes / MIB);
    printf("vectors of %d bytes; exponentials within %.1e of the right ones; lower quartiles of %d rounds\n\n", WIDTH,
        find_error(), rounds);
    printf("ns for a line of %d bytes (GB/s)\n", LINE);
    printf("| threads | place |           reading |            x *= 1 |              copy | non-temporal copy |\n");
    printf("|--------:|-------|------------------:|------------------:|------------------:|------------------:|\n");
    for (int team = 0; team < n_teams; team++) print_floors(team, rounds / 4);
    printf("\nns for a line of %d bytes, with its exponentials\n", LINE);
    printf("| threads | while                               | memory | arithmetic |   both | floors | overlap |\n");
    printf("|--------:|-------------------------------------|-------:|-----------:|-------:|-------:|--------:|\n");
    for (int team = 0; team < n_teams; team++) print_overlaps(team, rounds / 4);
    return 0;
}
