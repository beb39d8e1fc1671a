/*
 * What an A64 instruction is, for counting: its class, the multiply-accumulates of its lanes, the bytes it moves.
 *
 * The patterns follow the encoding tables of the Arm Architecture Reference Manual (DDI 0487, chapter C4). They are
 * compared with the disassembly of binutils by tests/unit/bench/test_a64_classes.py, instruction by instruction.
 */
#ifndef SEPDEPLOY_A64_H
#define SEPDEPLOY_A64_H

#include <stddef.h>
#include <stdint.h>

/* name, as it stands in the output */
#define A64_CLASSES(X)                                                                                               \
    X(INTEGER, "integer")                 /* general registers: arithmetic, logic, moves, addresses */               \
    X(MULTIPLY, "multiply")               /* general registers: madd, mul, umulh, ... */                             \
    X(DIVIDE, "divide")                   /* sdiv, udiv */                                                           \
    X(BRANCH, "branch")                                                                                              \
    X(LOAD, "load")                       /* into general registers; prefetches are integer instructions here */     \
    X(STORE, "store")                                                                                                \
    X(VECTOR_LOAD, "vector_load")         /* into SIMD and floating-point registers */                               \
    X(VECTOR_STORE, "vector_store")                                                                                  \
    X(SCALAR_FLOAT, "scalar_float")       /* one floating-point value; moves and conversions too */                  \
    X(VECTOR_FMA, "vector_fma")           /* fmla, fmls: single and double precision */                              \
    X(HALF_FMA, "half_fma")               /* fmla, fmls, fmlal, fmlsl on half precision */                           \
    X(VECTOR_FLOAT, "vector_float")       /* other floating-point vectors */                                         \
    X(FLOAT_DIVIDE, "float_divide")       /* fdiv, fsqrt, scalar or vector */                                        \
    X(DOT, "dot")                         /* sdot, udot, usdot, sudot, bfdot */                                      \
    X(MATRIX, "matrix")                   /* smmla, ummla, usmmla, bfmmla */                                         \
    X(INTEGER_MAC, "integer_mac")         /* mla, smlal, smull, sqdmlal, mul, sqrdmulh on vectors, ... */            \
    X(VECTOR_INTEGER, "vector_integer")   /* other integer vectors */                                                \
    X(PERMUTE, "permute")                 /* zip, uzp, trn, ext, tbl, dup, ins, umov */                              \
    X(SYSTEM, "system")                   /* mrs, barriers, hints, svc */                                            \
    X(OTHER, "other")                     /* SVE, SME, reserved */

enum a64_class {
#define X(id, name) A64_##id,
    A64_CLASSES(X)
#undef X
        A64_CLASS_COUNT
};

static const char *const a64_class_names[A64_CLASS_COUNT] = {
#define X(id, name) name,
    A64_CLASSES(X)
#undef X
};

struct a64_counts {
    uint64_t classes[A64_CLASS_COUNT];
    uint64_t macs;         /* multiply-accumulates, each lane counts */
    uint64_t loaded_bytes;
    uint64_t stored_bytes;
};

/* Multiply-accumulates of one instruction. Q is bit 30 (128 or 64 bits), size bits 23 to 22. */
enum a64_macs {
    NO_MACS,
    ONE,          /* a scalar */
    SINGLES,      /* sz (bit 22) = 0: 4 or 2 floats by Q; 1: 2 doubles */
    HALVES,       /* 8 or 4 by Q */
    LONG_HALVES,  /* fmlal: 4 or 2 by Q */
    LONG_LANES,   /* widening: as many lanes of `size` as fit into 64 bits, of the half that Q selects */
    LANES,        /* as many lanes of `size` as fit into the register */
    DOTS,         /* 4 per 32-bit lane: 16 or 8 by Q */
    PAIR_DOTS,    /* bfdot: 2 per 32-bit lane: 8 or 4 by Q */
    MATRICES,     /* 2x8 by 8x2: 32 */
    PAIR_MATRICES /* bfmmla, 2x4 by 4x2: 16 */
};

struct a64_pattern {
    uint32_t mask, value;
    enum a64_class class;
    enum a64_macs macs;
};

/* Advanced SIMD and floating point, op0 = x111. The first pattern that fits counts. */
static const struct a64_pattern a64_simd_patterns[] = {
    /* scalar floating point */
    {0xff000000, 0x1f000000, A64_SCALAR_FLOAT, ONE},             /* fmadd, fmsub, fnmadd, fnmsub */
    {0xff20fc00, 0x1e201800, A64_FLOAT_DIVIDE, NO_MACS},         /* fdiv */
    {0xff3ffc00, 0x1e21c000, A64_FLOAT_DIVIDE, NO_MACS},         /* fsqrt */
    {0x5f000000, 0x1e000000, A64_SCALAR_FLOAT, NO_MACS},         /* the rest: conversions and fmov too */
    /* scalars in the encodings of vectors */
    {0xff80b400, 0x5f801000, A64_SCALAR_FLOAT, ONE},             /* fmla, fmls by element */
    {0xffc0b400, 0x5f001000, A64_SCALAR_FLOAT, ONE},             /* of half precision */
    {0xdf00f400, 0x5f009000, A64_SCALAR_FLOAT, NO_MACS},         /* fmul, fmulx by element */
    {0xff003400, 0x5f003000, A64_INTEGER_MAC, ONE},              /* sqdmlal, sqdmlsl, sqdmull by element */
    {0xdf00e400, 0x5f00c000, A64_INTEGER_MAC, NO_MACS},          /* sqdmulh, sqrdmulh, sqrdmlah by element */
    {0xdf00f400, 0x5f00f000, A64_INTEGER_MAC, NO_MACS},          /* sqrdmlsh by element */
    {0xdf80f400, 0x5f00e400, A64_SCALAR_FLOAT, NO_MACS},         /* scvtf, ucvtf of fixed point */
    {0xdf80fc00, 0x5f00fc00, A64_SCALAR_FLOAT, NO_MACS},         /* fcvtzs, fcvtzu to fixed point */
    {0xffe08400, 0x5e000400, A64_PERMUTE, NO_MACS},              /* dup (mov) */
    {0xdf209c00, 0x5e209000, A64_INTEGER_MAC, ONE},              /* sqdmlal, sqdmlsl, sqdmull */
    {0xff20f400, 0x7e008400, A64_INTEGER_MAC, NO_MACS},          /* sqrdmlah, sqrdmlsh */
    {0xdf20fc00, 0x5e20b400, A64_INTEGER_MAC, NO_MACS},          /* sqdmulh, sqrdmulh */
    {0xdf20c400, 0x5e20c400, A64_SCALAR_FLOAT, NO_MACS},         /* three operands: fmulx, fcmeq, fabd, ... */
    {0xdf60c400, 0x5e400400, A64_SCALAR_FLOAT, NO_MACS},         /* of half precision */
    {0xdfbecc00, 0x5ea0c800, A64_SCALAR_FLOAT, NO_MACS},         /* two: fcmgt, fcmeq, fcmlt, fcmge, fcmle */
    {0xdf3f8c00, 0x5e218800, A64_SCALAR_FLOAT, NO_MACS},         /* fcvtns, fcvtms, scvtf, frecpe, ... */
    {0xff3ffc00, 0x7e216800, A64_SCALAR_FLOAT, NO_MACS},         /* fcvtxn */
    {0xdf7e0c00, 0x5e780800, A64_SCALAR_FLOAT, NO_MACS},         /* of half precision */
    {0xdf3ecc00, 0x5e30c800, A64_SCALAR_FLOAT, NO_MACS},         /* pairs: fmaxnmp, faddp, fmaxp */
    {0xdf3fcc00, 0x5e310800, A64_VECTOR_INTEGER, NO_MACS},       /* addp of a pair */
    {0xde000000, 0x5e000000, A64_VECTOR_INTEGER, NO_MACS},       /* the rest: integers, shifts, sha */
    /* dot products and matrices */
    {0xbfe0fc00, 0x2e40fc00, A64_DOT, PAIR_DOTS},                /* bfdot */
    {0xbfc0f400, 0x0f40f000, A64_DOT, PAIR_DOTS},                /* bfdot by element */
    {0x9fe0fc00, 0x0e809400, A64_DOT, DOTS},                     /* sdot, udot */
    {0xbfe0fc00, 0x0e809c00, A64_DOT, DOTS},                     /* usdot */
    {0x9fc0f400, 0x0f80e000, A64_DOT, DOTS},                     /* sdot, udot by element */
    {0xbf40f400, 0x0f00f000, A64_DOT, DOTS},                     /* sudot, usdot by element */
    {0xffe0fc00, 0x6e40ec00, A64_MATRIX, PAIR_MATRICES},         /* bfmmla */
    {0xdfe0fc00, 0x4e80a400, A64_MATRIX, MATRICES},              /* smmla, ummla */
    {0xffe0fc00, 0x4e80ac00, A64_MATRIX, MATRICES},              /* usmmla */
    /* multiply-adds of floating-point vectors */
    {0xbf20fc00, 0x0e20cc00, A64_VECTOR_FMA, SINGLES},           /* fmla, fmls */
    {0xbf80b400, 0x0f801000, A64_VECTOR_FMA, SINGLES},           /* by element */
    {0xbf60fc00, 0x0e400c00, A64_HALF_FMA, HALVES},              /* fmla, fmls of half precision */
    {0xbfc0b400, 0x0f001000, A64_HALF_FMA, HALVES},              /* by element */
    {0xbf20fc00, 0x0e20ec00, A64_HALF_FMA, LONG_HALVES},         /* fmlal, fmlsl */
    {0xbf20fc00, 0x2e20cc00, A64_HALF_FMA, LONG_HALVES},         /* fmlal2, fmlsl2 */
    {0xbfc0b400, 0x0f800000, A64_HALF_FMA, LONG_HALVES},         /* fmlal, fmlsl by element */
    {0xbfc0b400, 0x2f808000, A64_HALF_FMA, LONG_HALVES},         /* fmlal2, fmlsl2 by element */
    {0xbfe0fc00, 0x2ec0fc00, A64_HALF_FMA, LONG_HALVES},         /* bfmlalb, bfmlalt */
    {0xbfc0f400, 0x0fc0f000, A64_HALF_FMA, LONG_HALVES},         /* by element */
    {0xbf20e400, 0x2e00c400, A64_VECTOR_FMA, SINGLES},           /* fcmla: complex numbers */
    {0xbf009400, 0x2f001000, A64_VECTOR_FMA, SINGLES},           /* by element */
    /* multiply-adds and multiplications of integer vectors */
    {0x9f20dc00, 0x0e208000, A64_INTEGER_MAC, LONG_LANES},       /* smlal, umlal, smlsl, umlsl: 1000, 1010 */
    {0x9f20fc00, 0x0e20c000, A64_INTEGER_MAC, LONG_LANES},       /* smull, umull */
    {0xbf20dc00, 0x0e209000, A64_INTEGER_MAC, LONG_LANES},       /* sqdmlal, sqdmlsl */
    {0xbf20fc00, 0x0e20d000, A64_INTEGER_MAC, LONG_LANES},       /* sqdmull */
    {0x9f00b400, 0x0f002000, A64_INTEGER_MAC, LONG_LANES},       /* smlal, umlal, smlsl, umlsl by element */
    {0x9f00f400, 0x0f00a000, A64_INTEGER_MAC, LONG_LANES},       /* smull, umull by element */
    {0xbf00b400, 0x0f003000, A64_INTEGER_MAC, LONG_LANES},       /* sqdmlal, sqdmlsl by element */
    {0xbf00f400, 0x0f00b000, A64_INTEGER_MAC, LONG_LANES},       /* sqdmull by element */
    {0x9f20fc00, 0x0e209400, A64_INTEGER_MAC, LANES},            /* mla, mls */
    {0xbf20fc00, 0x0e209c00, A64_INTEGER_MAC, LANES},            /* mul */
    {0xbf00b400, 0x2f000000, A64_INTEGER_MAC, LANES},            /* mla, mls by element */
    {0xbf00f400, 0x0f008000, A64_INTEGER_MAC, LANES},            /* mul by element */
    {0x9f20fc00, 0x0e20b400, A64_INTEGER_MAC, NO_MACS},          /* sqdmulh, sqrdmulh */
    {0xbf20f400, 0x2e008400, A64_INTEGER_MAC, NO_MACS},          /* sqrdmlah, sqrdmlsh */
    {0x9f00e400, 0x0f00c000, A64_INTEGER_MAC, NO_MACS},          /* sqdmulh, sqrdmulh, sqrdmlah by element */
    {0xbf00f400, 0x2f00f000, A64_INTEGER_MAC, NO_MACS},          /* sqrdmlsh by element */
    /* divisions */
    {0xbfa0fc00, 0x2e20fc00, A64_FLOAT_DIVIDE, NO_MACS},         /* fdiv */
    {0xbfe0fc00, 0x2e403c00, A64_FLOAT_DIVIDE, NO_MACS},         /* fdiv of half precision */
    {0xbfbffc00, 0x2ea1f800, A64_FLOAT_DIVIDE, NO_MACS},         /* fsqrt */
    {0xbffffc00, 0x2ef9f800, A64_FLOAT_DIVIDE, NO_MACS},         /* fsqrt of half precision */
    /* lanes that change places */
    {0xbf208c00, 0x0e000800, A64_PERMUTE, NO_MACS},              /* zip, uzp, trn */
    {0xbfe08400, 0x2e000000, A64_PERMUTE, NO_MACS},              /* ext */
    {0xbfe08c00, 0x0e000000, A64_PERMUTE, NO_MACS},              /* tbl, tbx */
    {0x9fe08400, 0x0e000400, A64_PERMUTE, NO_MACS},              /* dup, ins, smov, umov */
    /* other floating-point vectors, after what looks like them */
    {0x9ff8f400, 0x0f00f400, A64_VECTOR_FLOAT, NO_MACS},         /* fmov of a constant */
    {0x9ff80400, 0x0f000400, A64_VECTOR_INTEGER, NO_MACS},       /* movi, mvni, orr, bic of a constant */
    {0x9fbffc00, 0x0ea1c800, A64_VECTOR_INTEGER, NO_MACS},       /* urecpe, ursqrte */
    {0x9f20c400, 0x0e20c400, A64_VECTOR_FLOAT, NO_MACS},         /* three operands: fadd, fmul, fmax, fcmeq, ... */
    {0x9f60c400, 0x0e400400, A64_VECTOR_FLOAT, NO_MACS},         /* of half precision */
    {0x9f00f400, 0x0f009000, A64_VECTOR_FLOAT, NO_MACS},         /* fmul, fmulx by element */
    {0xbf20ec00, 0x2e00e400, A64_VECTOR_FLOAT, NO_MACS},         /* fcadd */
    {0x9fbecc00, 0x0ea0c800, A64_VECTOR_FLOAT, NO_MACS},         /* fcmgt, fcmeq, fcmlt, fabs, ... with zero */
    {0x9f3fec00, 0x0e216800, A64_VECTOR_FLOAT, NO_MACS},         /* fcvtn, fcvtl, bfcvtn */
    {0x9f3f8c00, 0x0e218800, A64_VECTOR_FLOAT, NO_MACS},         /* frint*, fcvt*, scvtf, frecpe, ... */
    {0x9f7e0c00, 0x0e780800, A64_VECTOR_FLOAT, NO_MACS},         /* of half precision */
    {0x9f3ecc00, 0x0e30c800, A64_VECTOR_FLOAT, NO_MACS},         /* fmaxnmv, fmaxv, ... across lanes */
    {0x9f80fc00, 0x0f00e400, A64_VECTOR_FLOAT, NO_MACS},         /* scvtf, ucvtf of fixed point */
    {0x9f80f400, 0x0f00f400, A64_VECTOR_FLOAT, NO_MACS},         /* fcvtzs, fcvtzu to fixed point */
    {0, 0, A64_VECTOR_INTEGER, NO_MACS},                         /* everything else */
};

static inline uint64_t a64_lane_macs(uint32_t word, enum a64_macs macs)
{
    uint32_t q = (word >> 30) & 1, size = (word >> 22) & 3;

    switch (macs) {
    case ONE:
        return 1;
    case SINGLES:
        return size & 1 ? 2 : q ? 4 : 2;
    case HALVES:
        return q ? 8 : 4;
    case LONG_HALVES:
        return q ? 4 : 2;
    case LONG_LANES:
        return 8 >> size;
    case LANES:
        return (q ? 16 : 8) >> size;
    case DOTS:
        return q ? 16 : 8;
    case PAIR_DOTS:
        return q ? 8 : 4;
    case MATRICES:
        return 32;
    case PAIR_MATRICES:
        return 16;
    default:
        return 0;
    }
}

static inline void a64_count_simd(uint32_t word, struct a64_counts *counts)
{
    const struct a64_pattern *pattern = a64_simd_patterns;

    while ((word & pattern->mask) != pattern->value)
        pattern++;
    counts->classes[pattern->class]++;
    counts->macs += a64_lane_macs(word, pattern->macs);
}

static inline void a64_add_access(struct a64_counts *counts, int is_load, int is_vector, uint64_t bytes)
{
    if (is_load) {
        counts->classes[is_vector ? A64_VECTOR_LOAD : A64_LOAD]++;
        counts->loaded_bytes += bytes;
    } else {
        counts->classes[is_vector ? A64_VECTOR_STORE : A64_STORE]++;
        counts->stored_bytes += bytes;
    }
}

/* Loads and stores, op0 = x1x0. */
static inline void a64_count_access(uint32_t word, struct a64_counts *counts)
{
    /* registers in ld1..ld4 of whole registers, by bits 15 to 12 */
    static const uint8_t structure_registers[16] = {4, 0, 4, 0, 3, 0, 3, 1, 2, 0, 2, 0, 0, 0, 0, 0};
    uint32_t is_vector = (word >> 26) & 1, q = (word >> 30) & 1, size = word >> 30, kind = (word >> 27) & 7;
    uint32_t opc = (word >> 22) & 3, bit22 = (word >> 22) & 1;

    if ((word & 0xbf000000) == 0x0c000000) { /* ld1..ld4, st1..st4 of whole registers */
        a64_add_access(counts, bit22, 1, structure_registers[(word >> 12) & 15] * (q ? 16u : 8u));
    } else if ((word & 0xbf000000) == 0x0d000000) { /* of one lane, or one value in all lanes */
        uint32_t registers = (((word >> 13) & 1) << 1 | ((word >> 21) & 1)) + 1, scale = (word >> 14) & 3, bytes;

        if (scale == 3)
            bytes = 1u << ((word >> 10) & 3);
        else if (scale == 2)
            bytes = (word >> 10) & 1 ? 8 : 4;
        else
            bytes = 1u << scale;
        a64_add_access(counts, bit22, 1, registers * bytes);
    } else if (kind == 5) { /* pairs; 01 of general registers is ldpsw, or stgp */
        uint32_t bytes = is_vector ? 4u << size : size == 2 ? 8 : 4;

        a64_add_access(counts, bit22, is_vector, 2 * bytes);
    } else if (kind == 3 && !((word >> 24) & 1)) { /* relative to the program counter */
        if (!is_vector && size == 3)
            counts->classes[A64_INTEGER]++; /* prfm */
        else
            a64_add_access(counts, 1, is_vector, is_vector ? 4u << size : size == 1 ? 8 : 4);
    } else if (kind == 7) { /* one register */
        int is_atomic = (word & 0x3b200c00) == 0x38200000; /* ldadd, swp, cas-like: load and store in one */

        if (!is_vector && size == 3 && opc == 2 && !is_atomic)
            counts->classes[A64_INTEGER]++; /* prfm */
        else if (is_vector)
            a64_add_access(counts, opc & 1, 1, opc & 2 ? 16 : 1u << size);
        else
            a64_add_access(counts, opc != 0 || is_atomic, 0, 1u << size);
    } else if (kind == 3) { /* ldapur, stlur */
        a64_add_access(counts, opc != 0, 0, 1u << size);
    } else { /* exclusive, ordered; compare and swap loads and stores in one */
        int is_swap = (word & 0x3fa07c00) == 0x08a07c00 || (word & 0xbfa07c00) == 0x08207c00; /* cas, casp */

        a64_add_access(counts, bit22 || is_swap, 0, 1u << size);
    }
}

/* Add one instruction to `counts`. */
static inline void a64_count(uint32_t word, struct a64_counts *counts)
{
    uint32_t group = (word >> 25) & 15;

    if ((group & 5) == 4) {
        a64_count_access(word, counts);
    } else if ((group & 7) == 7) {
        a64_count_simd(word, counts);
    } else if ((group & 7) == 5) { /* data processing of registers */
        if ((word & 0x1f000000) == 0x1b000000)
            counts->classes[A64_MULTIPLY]++;
        else if ((word & 0x7fe0f800) == 0x1ac00800)
            counts->classes[A64_DIVIDE]++;
        else
            counts->classes[A64_INTEGER]++;
    } else if ((group & 14) == 8) { /* data processing with an immediate */
        counts->classes[A64_INTEGER]++;
    } else if ((group & 14) == 10) { /* branches, exceptions, system */
        if ((word & 0xfe000000) == 0xd4000000)
            counts->classes[A64_SYSTEM]++;
        else
            counts->classes[A64_BRANCH]++;
    } else {
        counts->classes[A64_OTHER]++;
    }
}

#endif
