//! Which role each route needs: one table, which a test holds to the OpenAPI document. The use
//! cases check the same again.

use axum::http::Method;
use ghost_domain::Role::{self, Admin, Operator, Viewer};

use crate::access::{Access, Shape};

/// What is fixed of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The method, in capitals.
    pub method: &'static str,
    /// The path, with its parameters in braces.
    pub path: &'static str,
    /// Who may call it.
    pub access: Access,
    /// How it ends.
    pub shape: Shape,
}

const fn open(path: &'static str) -> Route {
    Route {
        method: "GET",
        path,
        access: Access::Anyone,
        shape: Shape::Unary,
    }
}

const fn unary(method: &'static str, path: &'static str, role: Role) -> Route {
    Route {
        method,
        path,
        access: Access::Role(role),
        shape: Shape::Unary,
    }
}

const fn stream(method: &'static str, path: &'static str, role: Role) -> Route {
    Route {
        method,
        path,
        access: Access::Role(role),
        shape: Shape::Stream,
    }
}

/// Every route that is served.
pub const ROUTES: &[Route] = &[
    open("/health"),
    open("/live"),
    open("/ready"),
    unary("GET", "/v1/openapi.json", Viewer),
    unary("GET", "/v1/vms", Viewer),
    unary("POST", "/v1/vms", Operator),
    unary("GET", "/v1/vms/{vm}", Viewer),
    unary("PATCH", "/v1/vms/{vm}", Operator),
    unary("DELETE", "/v1/vms/{vm}", Operator),
    unary("POST", "/v1/vms/{vm}/start", Operator),
    unary("POST", "/v1/vms/{vm}/stop", Operator),
    unary("POST", "/v1/vms/{vm}/restart", Operator),
    unary("POST", "/v1/vms/{vm}/pause", Operator),
    unary("POST", "/v1/vms/{vm}/resume", Operator),
    stream("GET", "/v1/vms/{vm}/logs", Operator),
    unary("GET", "/v1/images", Viewer),
    unary("POST", "/v1/images", Operator),
    unary("GET", "/v1/images/{name}", Viewer),
    stream("PUT", "/v1/images/{name}", Operator),
    unary("DELETE", "/v1/images/{name}", Operator),
    unary("GET", "/v1/catalogue", Viewer),
    unary("GET", "/v1/operations", Viewer),
    unary("GET", "/v1/operations/{id}", Viewer),
    unary("DELETE", "/v1/operations/{id}", Operator),
    stream("GET", "/v1/events", Viewer),
    unary("GET", "/v1/networks", Viewer),
    unary("GET", "/v1/networks/{name}", Viewer),
    unary("GET", "/v1/host", Viewer),
    // What runs in guests takes as long as it takes; each of these has bounds of its own.
    stream("GET", "/v1/vms/{vm}/exec", Operator),
    stream("POST", "/v1/vms/{vm}/exec", Operator),
    stream("GET", "/v1/vms/{vm}/shell", Operator),
    stream("GET", "/v1/vms/{vm}/files", Operator),
    stream("PUT", "/v1/vms/{vm}/files", Operator),
    unary("GET", "/v1/vms/{vm}/guest", Viewer),
    unary("POST", "/v1/vms/{vm}/guest/ping", Viewer),
    unary("GET", "/v1/vms/{vm}/history", Viewer),
    unary("POST", "/v1/vms/{vm}/guest-ip", Operator),
    unary("POST", "/v1/vms/{vm}/guest/shutdown", Operator),
    unary("POST", "/v1/vms/{vm}/guest/password", Operator),
    unary("POST", "/v1/vms/{vm}/guest/ssh-keys", Operator),
    unary("POST", "/v1/vms/{vm}/guest/clock", Operator),
    stream("POST", "/v1/vms/{vm}/guest/update", Operator),
    unary("POST", "/v1/vms/{vm}/guest/freeze", Operator),
    unary("POST", "/v1/vms/{vm}/guest/thaw", Operator),
    unary("GET", "/v1/lockdown", Viewer),
    unary("PUT", "/v1/lockdown", Admin),
    // Who did what is for those who answer for it.
    unary("GET", "/v1/audit", Admin),
    unary("GET", "/v1/audit/verify", Admin),
    stream(
        "POST",
        "/limiquantix.compute.v1.VMService/PingAgent",
        Viewer,
    ),
    stream(
        "POST",
        "/limiquantix.compute.v1.VMService/ExecuteScript",
        Operator,
    ),
    stream(
        "POST",
        "/limiquantix.compute.v1.VMService/ReadGuestFile",
        Operator,
    ),
    stream(
        "POST",
        "/limiquantix.compute.v1.VMService/WriteGuestFile",
        Operator,
    ),
    stream(
        "POST",
        "/limiquantix.compute.v1.VMService/GuestShutdown",
        Operator,
    ),
];

/// The route of a request, by the path pattern that the router matched. `HEAD` is `GET` without
/// the body.
pub(super) fn route(method: &Method, path: &str) -> Option<&'static Route> {
    let method = if method == Method::HEAD {
        "GET"
    } else {
        method.as_str()
    };
    ROUTES
        .iter()
        .find(|route| route.method == method && route.path == path)
}
