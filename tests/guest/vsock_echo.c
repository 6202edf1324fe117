// Takes connections at a port, one after another, and sends back what comes:
//   vsock_echo PORT COUNT
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv) {
    if (argc < 3)
        return 1;
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = atoi(argv[1])};
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16)) {
        perror("vsock");
        return 1;
    }
    for (int left = atoi(argv[2]); left > 0; left--) {
        int stream = accept(listener, 0, 0);
        char data[256];
        ssize_t count;
        while ((count = read(stream, data, sizeof data)) > 0)
            if (write(stream, data, count) != count)
                return 2;
        close(stream);
    }
    return 0;
}
