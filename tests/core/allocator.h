/* The allocator that counts: blocks that live, and the call that is to fail. */
static int64_t live, asked, failing;

static void *count_allocate(size_t bytes, void *arg)
{
    (void)arg;
    if (asked++ == failing)
        return NULL;
    live++;
    return malloc(bytes);
}

static void count_release(void *memory, void *arg)
{
    (void)arg;
    live--;
    free(memory);
}
