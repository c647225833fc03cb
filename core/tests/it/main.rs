//! Core from outside: one binary for all integration tests.

mod agent;
mod front;
mod links;
mod matrix;
mod program;
mod route;
mod weight;
mod world;
