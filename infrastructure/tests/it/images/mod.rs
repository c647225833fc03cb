//! The image cache from outside: real files, real `qemu-img`, an HTTP server of our own.

mod support;

mod adopt;
mod corpus;
mod full_disk;
mod pull;
