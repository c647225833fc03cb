//! The whole error table, as programs and people see it.

use std::fmt::Write;

use ghost_domain::ErrorCode;
use ghost_presentation::grpc::status::grpc_code;
use ghost_presentation::http::problem::http_status;

#[test]
fn the_error_table() {
    let mut table = String::new();
    for code in ErrorCode::ALL {
        let (grpc, http) = (grpc_code(*code), http_status(*code));
        assert_ne!(grpc, tonic::Code::Ok);
        assert!(http.is_client_error() || http.is_server_error());
        writeln!(table, "{code:<24} {grpc:?} {}", http.as_u16()).unwrap();
    }
    insta::assert_snapshot!(table);
}
