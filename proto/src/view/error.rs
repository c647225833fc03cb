//! What a failed command writes to stderr with `-o json`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A field of a request that broke a rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldViolation {
    /// The field as the API names it, such as `disk_bytes`.
    pub field: String,
    /// The rule it broke.
    pub description: String,
}

/// What went wrong, why, and what to do next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// The stable code.
    pub code: String,
    /// What happened.
    pub message: String,
    /// Why, if that is known.
    pub cause: Option<String>,
    /// What to do next.
    pub hint: Option<String>,
    /// The operation it belongs to.
    #[schema(format = Uuid)]
    pub operation_id: Option<String>,
    /// Which fields of the request broke which rule.
    pub violations: Vec<FieldViolation>,
}

/// The document: `{"error":{"code","message","cause","hint","operation_id","violations"}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}
