/* The allocator that counts: blocks that live, and the call that is to fail. What it gives is NaN in every type, so that who
 * reads what was never written is seen. */
static int64_t live, asked, failing;

static void *count_allocate(size_t bytes, void *arg)
{
    (void)arg;
    if (asked++ == failing)
        return NULL;
    live++;
    void *memory = malloc(bytes);
    if (memory)
        memset(memory, 0xff, bytes);
    return memory;
}

static void count_release(void *memory, void *arg)
{
    (void)arg;
    live--;
    free(memory);
}
