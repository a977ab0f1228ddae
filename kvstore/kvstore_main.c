#include "kvstore/kvstore_room.h"

#include <signal.h>

int main(int argc, char **argv) {
    /* A file size limit then reads as a full disk instead of killing the store. */
    (void)signal(SIGXFSZ, SIG_IGN);
    return ibid_host_main(argc, argv, &ibid_kvstore_room);
}
