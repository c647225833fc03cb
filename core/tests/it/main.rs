//! Core from outside: one binary for all integration tests.

mod agent;
mod front;
mod matrix;
mod route;
mod world;
