//! Core from outside: one binary for all integration tests.

mod agent;
mod route;
