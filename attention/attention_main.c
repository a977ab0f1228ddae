#include "attention/attention_room.h"

int main(int argc, char **argv) {
    return ibid_host_main(argc, argv, &ibid_attention_room);
}
