//! Which role each route needs: one table, which a test holds to the OpenAPI document. The use
//! cases check the same again.

use axum::http::Method;
use ghost_application::fleet::CoreReach;
use ghost_domain::Role::{self, Admin, Operator, Viewer};

use crate::access::{Access, GUEST, HOOKS, Shape, UPDATE, WHOLE_LOG};

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
    /// How far it reaches, where it comes through Ghost Core.
    pub core: CoreReach,
}

impl Route {
    /// Never through Ghost Core, whatever the role.
    const fn own(mut self) -> Self {
        self.core = CoreReach::Never;
        self
    }

    /// What Core does itself, by the role alone.
    const fn of_the_fleet(mut self) -> Self {
        self.core = CoreReach::Plain;
        self
    }

    /// Through Ghost Core as what enters guests, though the host's own people need not be let in.
    const fn shows_guests(mut self) -> Self {
        self.core = CoreReach::Enter;
        self
    }
}

/// What is for administrators of the host is nothing for Core.
const fn reach(role: Role) -> CoreReach {
    match role {
        Role::Viewer | Role::Operator => CoreReach::Plain,
        Role::Admin => CoreReach::Never,
    }
}

const fn open(path: &'static str) -> Route {
    Route {
        method: "GET",
        path,
        access: Access::Anyone,
        shape: Shape::Unary,
        core: CoreReach::Plain,
    }
}

const fn unary(method: &'static str, path: &'static str, role: Role) -> Route {
    Route {
        method,
        path,
        access: Access::Role(role),
        shape: Shape::Unary,
        core: reach(role),
    }
}

const fn stream(method: &'static str, path: &'static str, role: Role) -> Route {
    Route {
        method,
        path,
        access: Access::Role(role),
        shape: Shape::Stream,
        core: reach(role),
    }
}

const fn long(method: &'static str, path: &'static str, role: Role, shape: Shape) -> Route {
    Route {
        method,
        path,
        access: Access::Role(role),
        shape,
        core: reach(role),
    }
}

/// What enters a guest.
const fn enters(method: &'static str, path: &'static str, shape: Shape) -> Route {
    Route {
        method,
        path,
        access: Access::Guests,
        shape,
        core: CoreReach::Enter,
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
    stream("GET", "/v1/vms/{vm}/logs", Operator).shows_guests(),
    unary("GET", "/v1/images", Viewer),
    unary("POST", "/v1/images", Operator),
    unary("GET", "/v1/images/{name}", Viewer),
    // Core names images of the catalogue and brings none.
    stream("PUT", "/v1/images/{name}", Operator).own(),
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
    enters("GET", "/v1/vms/{vm}/exec", Shape::Stream),
    enters("POST", "/v1/vms/{vm}/exec", Shape::Stream),
    enters("GET", "/v1/vms/{vm}/shell", Shape::Stream),
    enters("GET", "/v1/vms/{vm}/console", Shape::Stream),
    enters("GET", "/v1/vms/{vm}/files", Shape::Stream),
    enters("PUT", "/v1/vms/{vm}/files", Shape::Stream),
    unary("GET", "/v1/vms/{vm}/guest", Viewer),
    unary("POST", "/v1/vms/{vm}/guest/ping", Viewer),
    unary("GET", "/v1/vms/{vm}/history", Viewer),
    unary("POST", "/v1/vms/{vm}/guest-ip", Operator),
    enters("POST", "/v1/vms/{vm}/guest/shutdown", GUEST),
    enters("POST", "/v1/vms/{vm}/guest/password", GUEST),
    enters("POST", "/v1/vms/{vm}/guest/ssh-keys", GUEST),
    enters("POST", "/v1/vms/{vm}/guest/clock", GUEST),
    enters("POST", "/v1/vms/{vm}/guest/update", UPDATE),
    // Off is for every operator; the use case asks for more where it is to be on.
    unary("PUT", "/v1/vms/{vm}/guest/access", Operator),
    enters("POST", "/v1/vms/{vm}/guest/freeze", HOOKS),
    enters("POST", "/v1/vms/{vm}/guest/thaw", HOOKS),
    unary("GET", "/v1/lockdown", Viewer),
    unary("PUT", "/v1/lockdown", Admin),
    // Who did what is for those who answer for it.
    unary("GET", "/v1/audit", Admin),
    long("GET", "/v1/audit/verify", Admin, WHOLE_LOG),
    stream(
        "POST",
        "/limiquantix.compute.v1.VMService/PingAgent",
        Viewer,
    ),
    enters(
        "POST",
        "/limiquantix.compute.v1.VMService/ExecuteScript",
        Shape::Stream,
    ),
    enters(
        "POST",
        "/limiquantix.compute.v1.VMService/ReadGuestFile",
        Shape::Stream,
    ),
    enters(
        "POST",
        "/limiquantix.compute.v1.VMService/WriteGuestFile",
        Shape::Stream,
    ),
    enters(
        "POST",
        "/limiquantix.compute.v1.VMService/GuestShutdown",
        Shape::Stream,
    ),
];

/// The routes of Batwa, which are served where the configuration says so (`compat.batwa`).
pub const BATWA_ROUTES: &[Route] = &[
    // It acknowledges and changes nothing.
    unary("POST", "/api/agent/register", Viewer),
    unary("GET", "/api/agent/list", Viewer),
    unary("GET", "/api/agent/info/{agent_id}", Viewer),
    // So does this: what is known of a host comes over its own link.
    unary("POST", "/api/agent/heartbeat", Viewer),
    // Of Core, which reaches no host for it; by an agent it is refused to everybody.
    unary("DELETE", "/api/agent/unregister/{agent_id}", Admin).of_the_fleet(),
    unary("GET", "/api/vm/list", Viewer),
    unary("GET", "/api/vm/info/{vm_name}", Viewer),
    unary("POST", "/api/vm/create", Operator),
    unary("POST", "/api/vm/start", Operator),
    unary("POST", "/api/vm/stop", Operator),
    unary("POST", "/api/vm/delete", Operator),
    enters("POST", "/api/execute", Shape::Stream),
    enters("GET", "/ws", Shape::Stream),
];

/// The route of a request, by the path pattern that the router matched. `HEAD` is `GET` without
/// the body.
pub(super) fn route(method: &Method, path: &str) -> Option<&'static Route> {
    find(ROUTES, method, path).or_else(|| batwa_route(method, path))
}

/// The same among the routes of Batwa alone.
pub(super) fn batwa_route(method: &Method, path: &str) -> Option<&'static Route> {
    find(BATWA_ROUTES, method, path)
}

fn find(routes: &'static [Route], method: &Method, path: &str) -> Option<&'static Route> {
    let method = if method == Method::HEAD {
        "GET"
    } else {
        method.as_str()
    };
    routes
        .iter()
        .find(|route| route.method == method && route.path == path)
}
