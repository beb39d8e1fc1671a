/*
 * armcount: counts what an AArch64 program executes between marks, as a TCG plugin of qemu-aarch64 (user mode, 7.2).
 *
 * The program marks by a system call that Linux does not have, syscall(0x5344, what): 0 begins a region, 1 ends it. For
 * each region the plugin writes one line of JSON, with what was executed as (number of a block, how often), and before it
 * one line for every block that no line had before: its instructions and what they are (a64.h). A block is a stretch of
 * instructions that QEMU runs from its first to its last. Only the thread that made the mark counts: what others do in
 * the background depends on the speed of the host, and its instructions are told apart as "elsewhere".
 *
 * Arguments: out=FILE; l1=KIB:WAYS and l2=KIB:WAYS simulate data caches (lines of 64 bytes, least recently used, filled
 * on loads and stores, no prefetching) from the first region on.
 *
 * Lines:
 *   {"block":7,"words":"aa1f03e0...","classes":{"integer":3},"macs":0,"loaded_bytes":0,"stored_bytes":0}
 *   {"region":0,"blocks":[[7,12],...],"elsewhere":0,"l1_accesses":1,"l1_misses":1,"l2_misses":0}
 *   {"end":true}  the last line of a program that was not killed
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "a64.h"
#include "qemu-plugin.h"

QEMU_PLUGIN_EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;
QEMU_PLUGIN_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv);

enum { MARK = 0x5344, BEGIN = 0, END = 1 };
enum { TABLE_BITS = 18, LINE_BITS = 6, MAX_INSNS = 1024 };

/* ---- blocks ---- */

struct block {
    uint64_t address;
    uint64_t executed; /* in the region, by the thread that marked it */
    uint32_t length;
    uint32_t *words;
    int64_t number; /* in the output; -1 until it is written */
    struct block *next;
};

static struct block *table[1 << TABLE_BITS];
static FILE *out;
static int64_t blocks_written;
static int64_t regions_written;
static int in_region;
static unsigned marking;   /* the thread that began the region */
static uint64_t elsewhere; /* instructions of other threads meanwhile; may miss some where they run at once */

static void *allocated(size_t count, size_t size)
{
    void *memory = calloc(count, size);

    if (!memory) {
        fprintf(stderr, "armcount: out of memory\n");
        exit(70);
    }
    return memory;
}

/* The block with these instructions at this address; the same one when QEMU translates it again. */
static struct block *find_block(uint64_t address, const uint32_t *words, uint32_t length)
{
    uint32_t hash = 2166136261u ^ (uint32_t)(address >> 2);
    struct block *block;

    for (uint32_t i = 0; i < length; i++) {
        hash = (hash ^ words[i]) * 16777619u;
        hash ^= hash >> 13;
    }
    hash &= (1u << TABLE_BITS) - 1;
    for (block = table[hash]; block; block = block->next)
        if (block->address == address && block->length == length && !memcmp(block->words, words, length * 4))
            return block;
    block = allocated(1, sizeof *block);
    block->address = address;
    block->length = length;
    block->words = allocated(length, 4);
    memcpy(block->words, words, length * 4);
    block->number = -1;
    block->next = table[hash];
    table[hash] = block;
    return block;
}

static void write_block(struct block *block)
{
    struct a64_counts counts = {0};
    const char *separator = "";

    block->number = blocks_written++;
    fprintf(out, "{\"block\":%" PRId64 ",\"words\":\"", block->number);
    for (uint32_t i = 0; i < block->length; i++) {
        fprintf(out, "%08x", block->words[i]);
        a64_count(block->words[i], &counts);
    }
    fprintf(out, "\",\"classes\":{");
    for (int i = 0; i < A64_CLASS_COUNT; i++) {
        if (counts.classes[i]) {
            fprintf(out, "%s\"%s\":%" PRIu64, separator, a64_class_names[i], counts.classes[i]);
            separator = ",";
        }
    }
    fprintf(out, "},\"macs\":%" PRIu64 ",\"loaded_bytes\":%" PRIu64 ",\"stored_bytes\":%" PRIu64 "}\n", counts.macs,
            counts.loaded_bytes, counts.stored_bytes);
}

/* ---- data caches ---- */

struct cache {
    uint32_t sets, ways;
    uint64_t *lines;   /* line + 1 by set and way; 0 is empty */
    uint64_t *used_at; /* when each was used last */
    uint64_t clock, accesses, misses;
};

static struct cache l1, l2;
static int has_caches;

static int set_cache(struct cache *cache, const char *text)
{
    unsigned kib, ways;

    if (sscanf(text, "%u:%u", &kib, &ways) != 2 || !ways || kib * 1024 % (ways << LINE_BITS) || !kib)
        return 0;
    cache->ways = ways;
    cache->sets = (kib * 1024 >> LINE_BITS) / ways;
    cache->lines = allocated((size_t)cache->sets * ways, sizeof *cache->lines);
    cache->used_at = allocated((size_t)cache->sets * ways, sizeof *cache->used_at);
    return 1;
}

/* Whether the line was there; it is afterwards. */
static int access_line(struct cache *cache, uint64_t line)
{
    size_t first = (size_t)(line % cache->sets) * cache->ways, oldest = first;

    cache->accesses++;
    cache->clock++;
    for (size_t i = first; i < first + cache->ways; i++) {
        if (cache->lines[i] == line + 1) {
            cache->used_at[i] = cache->clock;
            return 1;
        }
        if (cache->used_at[i] < cache->used_at[oldest])
            oldest = i;
    }
    cache->misses++;
    cache->lines[oldest] = line + 1;
    cache->used_at[oldest] = cache->clock;
    return 0;
}

static void on_access(unsigned vcpu, qemu_plugin_meminfo_t info, uint64_t address, void *data)
{
    uint64_t last;

    (void)data;
    if (vcpu != marking || (!in_region && !regions_written)) /* start-up and loading only evict each other */
        return;
    last = (address + (1u << qemu_plugin_mem_size_shift(info)) - 1) >> LINE_BITS;
    for (uint64_t line = address >> LINE_BITS; line <= last; line++)
        if (!access_line(&l1, line))
            access_line(&l2, line);
}

/* ---- what QEMU calls ---- */

static void on_execution(unsigned vcpu, void *data)
{
    struct block *block = data;

    if (!in_region)
        return;
    if (vcpu == marking)
        block->executed++;
    else
        elsewhere += block->length;
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    uint32_t words[MAX_INSNS];
    size_t length = qemu_plugin_tb_n_insns(tb);
    struct block *block;

    (void)id;
    if (length > MAX_INSNS) { /* QEMU ends blocks at 512 instructions */
        fprintf(stderr, "armcount: a block of %zu instructions\n", length);
        exit(70);
    }
    for (size_t i = 0; i < length; i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);

        memcpy(&words[i], qemu_plugin_insn_data(insn), 4);
        if (has_caches)
            qemu_plugin_register_vcpu_mem_cb(insn, on_access, QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_RW, NULL);
    }
    block = find_block(qemu_plugin_tb_vaddr(tb), words, (uint32_t)length);
    qemu_plugin_register_vcpu_tb_exec_cb(tb, on_execution, QEMU_PLUGIN_CB_NO_REGS, block);
}

static void begin_region(unsigned vcpu)
{
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        for (struct block *block = table[i]; block; block = block->next)
            block->executed = 0;
    l1.accesses = l1.misses = l2.accesses = l2.misses = elsewhere = 0;
    marking = vcpu;
    in_region = 1;
}

static void end_region(void)
{
    const char *separator = "";

    in_region = 0;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        for (struct block *block = table[i]; block; block = block->next)
            if (block->executed && block->number < 0)
                write_block(block);
    fprintf(out, "{\"region\":%" PRId64 ",\"blocks\":[", regions_written++);
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        for (struct block *block = table[i]; block; block = block->next) {
            if (block->executed) {
                fprintf(out, "%s[%" PRId64 ",%" PRIu64 "]", separator, block->number, block->executed);
                separator = ",";
            }
        }
    }
    fprintf(out, "],\"elsewhere\":%" PRIu64, elsewhere);
    if (has_caches)
        fprintf(out, ",\"l1_accesses\":%" PRIu64 ",\"l1_misses\":%" PRIu64 ",\"l2_misses\":%" PRIu64, l1.accesses,
                l1.misses, l2.misses);
    fprintf(out, "}\n");
    fflush(out); /* a later crash takes nothing of it along */
}

static void on_syscall(qemu_plugin_id_t id, unsigned vcpu, int64_t number, uint64_t what, uint64_t a2, uint64_t a3,
                       uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8)
{
    (void)id, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number != MARK)
        return;
    if (what == BEGIN)
        begin_region(vcpu);
    else if (what == END && in_region && vcpu == marking)
        end_region();
}

static void on_exit_of_guest(qemu_plugin_id_t id, void *data)
{
    (void)id, (void)data;
    fprintf(out, "{\"end\":true}\n");
    if (fflush(out) || ferror(out) || fclose(out))
        fprintf(stderr, "armcount: the counts cannot be written\n");
}

int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    const char *path = NULL;

    (void)info;
    for (int i = 0; i < argc; i++) {
        if (!strncmp(argv[i], "out=", 4)) {
            path = argv[i] + 4;
        } else if (!strncmp(argv[i], "l1=", 3) && set_cache(&l1, argv[i] + 3)) {
        } else if (!strncmp(argv[i], "l2=", 3) && set_cache(&l2, argv[i] + 3)) {
        } else {
            fprintf(stderr, "armcount: cannot use the argument %s\n", argv[i]);
            return 1;
        }
    }
    if (!l1.ways != !l2.ways) {
        fprintf(stderr, "armcount: l1 and l2 go together\n");
        return 1;
    }
    has_caches = l1.ways != 0;
    out = path ? fopen(path, "w") : NULL;
    if (!out) {
        fprintf(stderr, "armcount: cannot write out=%s\n", path ? path : "");
        return 1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_vcpu_syscall_cb(id, on_syscall);
    qemu_plugin_register_atexit_cb(id, on_exit_of_guest, NULL);
    return 0;
}
