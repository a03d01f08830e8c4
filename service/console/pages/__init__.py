"""The pages, one module for each place of the console."""

from service.console.pages import (
    audit_log,
    audits,
    classify,
    collection,
    exemplar,
    health,
    images,
    pools,
    reviews,
    sign_in,
    thresholds,
    versions,
)

ROUTERS = (
    sign_in.router,
    classify.router,
    reviews.router,
    pools.router,
    collection.router,
    exemplar.router,
    versions.router,
    thresholds.router,
    audits.router,
    audit_log.router,
    health.router,
    images.router,
)
